"""The pictures that are compared: of two folders, or drawn by two models from the same prompts and seeds."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...core.errors import ImagineFlashError
from ...engine import Engine, GenerateRequest

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"  # of an image folder as Hugging Face datasets reads it: file_name, text


@dataclass(frozen=True)
class Shown:
    """One picture: its caption and the bytes of its file."""

    caption: str
    data: bytes


@dataclass(frozen=True)
class Pair:
    """Two pictures of one caption."""

    key: str
    caption: str
    a: bytes
    b: bytes


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
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES]
    return {path.stem: Shown(captions.get(path.stem, ""), path.read_bytes()) for path in files}


def pictures_drawn(engine: Engine, prompts: Sequence[str], steps: int | None) -> Iterator[tuple[str, Shown]]:
    """A picture of each prompt, the i-th from seed i, as they are drawn."""
    for seed, prompt in enumerate(prompts):
        result = engine.generate(GenerateRequest(prompt=prompt, steps=steps, seed=seed))
        file = io.BytesIO()
        Image.fromarray(result.images[0]).save(file, "PNG")
        yield f"{seed:04d}", Shown(prompt, file.getvalue())


def pairs_of(a: Mapping[str, Shown], b: Mapping[str, Shown]) -> list[Pair]:
    """The pictures that both have. ImagineFlashError where there are none."""
    both = [key for key in a if key in b]
    if not both:
        raise ImagineFlashError(
            "A and B have no picture of the same name; name those of one prompt alike in both folders"
        )
    return [Pair(key, a[key].caption or b[key].caption, a[key].data, b[key].data) for key in both]
