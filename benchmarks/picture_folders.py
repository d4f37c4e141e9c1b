"""Folders of pictures with captions, as Hugging Face datasets reads image folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ImagineFlashError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"  # file_name, text


@dataclass(frozen=True)
class Shown:
    """One picture: its caption and the bytes of its file."""

    caption: str
    data: bytes


def picture_files(folder: Path) -> list[Path]:
    """The pictures' files, sorted; none where there is no such folder."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in there if path.suffix.lower() in PICTURES]


def pictures_in(folder: Path) -> dict[str, Shown]:
    """The pictures of a folder by name without ending, with the captions of its metadata.jsonl, where it has one."""
    captions: dict[str, str] = {}
    metadata = folder / METADATA
    if metadata.is_file():
        try:
            rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
            captions = {Path(row["file_name"]).stem: str(row["text"]) for row in rows}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ImagineFlashError(f"{metadata}: each line must hold file_name and text ({error})") from None
    return {path.stem: Shown(captions.get(path.stem, ""), path.read_bytes()) for path in picture_files(folder)}
