"""Prompts without pictures: all that backward distillation needs."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import ImagineFlashError
from .emoji import caption_at


def emoji_prompts(count: int, seed: int) -> list[str]:
    """Captions of the training split, as many as asked."""
    return [caption_at(seed, index)[1].text for index in range(count)]


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are passed over. ImagineFlashError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImagineFlashError(
            f"cannot read prompts from {path} ({error}); give a UTF-8 text file, one prompt a line"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ImagineFlashError(f"{path} holds no prompt; write one a line")
    return prompts
