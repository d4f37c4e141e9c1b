"""Prompts without pictures: all that backward distillation needs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...core.errors import ImagineFlashError
from .captions import describe_with_patterns
from .emoji import caption_at, scene_at


def emoji_prompts(count: int, seed: int, stated_patterns: float = 0.0) -> list[str]:
    """Captions of the training split's first scenes, as many as asked; stated_patterns: see describe_with_patterns."""
    if not stated_patterns:
        return [caption_at(seed, index)[1].text for index in range(count)]
    words = (np.random.default_rng([seed, index, 2]) for index in range(count))
    return [describe_with_patterns(scene_at(seed, i), rng, stated_patterns).text for i, rng in enumerate(words)]


GENERAL = "general"  # the name of the prompts that the package brings


def general_prompts(count: int = 2000) -> list[str]:
    """Different prompts of animals, people, places, things, food, vehicles, imagined scenes and writing, each kind as often;
    the same ones every time."""
    import yaml

    source = yaml.safe_load(Path(__file__).with_name("general_prompts.yaml").read_text(encoding="utf-8"))
    kinds, words, draw = list(source["forms"].values()), source["words"], np.random.default_rng(0)
    found: dict[str, None] = {}
    while len(found) < count:
        form = draw.choice(kinds[len(found) % len(kinds)])
        prompt = re.sub(r"\{(\w+)\}", lambda place: str(draw.choice(words[place[1]])), form)
        found[re.sub(r"\ba (?=[aeiou])", "an ", prompt)] = None
    return list(found)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are passed over; "general" gives general_prompts(). ImagineFlashError where there is none."""
    if str(path) == GENERAL:
        return general_prompts()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImagineFlashError(
            f"cannot read prompts from {path} ({error}); give a UTF-8 text file, one prompt a line"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ImagineFlashError(f"{path} holds no prompt; write one a line")
    return prompts
