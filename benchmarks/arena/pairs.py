"""The pictures that are compared: of two folders, or drawn by two models from the same prompts and seeds."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ...core.errors import ImagineFlashError
from ...engine import Engine, GenerateRequest
from ..picture_folders import Shown


@dataclass(frozen=True)
class Pair:
    """Two pictures of one caption."""

    key: str
    caption: str
    a: bytes
    b: bytes


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
