"""Folders of pictures with captions, as Hugging Face datasets reads image folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, with their numbers from 1. Raises ImagineFlashError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ImagineFlashError(f"{path} is not UTF-8; save it as UTF-8") from None
    lines = enumerate(text.split("\n"), 1)  # not `splitlines`: JSON may hold what that takes for an end, such as U+2028
    return ((number, line) for number, line in lines if line.strip())


def same_captions(a: Mapping[str, Shown], b: Mapping[str, Shown]) -> None:
    """Raises ImagineFlashError where both caption a picture of one name, and differently."""
    for name in a.keys() & b.keys():
        ours, theirs = a[name].caption, b[name].caption
        if ours and theirs and ours != theirs:
            raise ImagineFlashError(
                f"the pictures {name!r} are of two captions, {ours[:60]!r} and {theirs[:60]!r}; name those of one prompt alike"
            )


def pictures_in(folder: Path) -> dict[str, Shown]:
    """The pictures of a folder by name without ending, with the captions of its metadata.jsonl, where it has one."""
    captions: dict[str, str] = {}
    metadata = folder / METADATA
    if metadata.is_file():
        try:
            rows = [json.loads(line) for _, line in json_lines(metadata)]
            captions = {Path(row["file_name"]).stem: str(row["text"]) for row in rows}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ImagineFlashError(f"{metadata}: each line must hold file_name and text ({error})") from None
    return {path.stem: Shown(captions.get(path.stem, ""), path.read_bytes()) for path in picture_files(folder)}
