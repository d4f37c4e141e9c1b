"""The pictures that are compared: of two folders, or drawn by two models from the same prompts and seeds."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ...core.errors import ImagineFlashError
from ...engine import Engine, GenerateRequest
from ..picture_folders import Shown, same_captions


@dataclass(frozen=True)
class Pair:
    """Two pictures of one caption."""

    key: str
    caption: str
    a: bytes
    b: bytes

    @property
    def pictures(self) -> str:
        """Which two they are: votes on others of the same name are no votes on these."""
        return hashlib.sha256(hashlib.sha256(self.a).digest() + hashlib.sha256(self.b).digest()).hexdigest()[:16]


def pictures_drawn(engine: Engine, prompts: Sequence[str], steps: int | None) -> Iterator[tuple[str, Shown]]:
    """A picture of each prompt, the first from seed 0, as they are drawn; named as `generate --prompts` names them."""
    digits = max(4, len(str(len(prompts))))
    for seed, prompt in enumerate(prompts):
        result = engine.generate(GenerateRequest(prompt=prompt, steps=steps, seed=seed))
        file = io.BytesIO()
        Image.fromarray(result.images[0]).save(file, "PNG")
        yield f"{seed + 1:0{digits}}", Shown(prompt, file.getvalue())


def pairs_of(a: Mapping[str, Shown], b: Mapping[str, Shown]) -> list[Pair]:
    """The pictures that both have. ImagineFlashError where there are none, one cannot be read, or two captions differ."""
    same_captions(a, b)
    both = [key for key in a if key in b]
    if not both:
        raise ImagineFlashError(
            "A and B have no picture of the same name; name those of one prompt alike in both folders"
        )
    for name, pictures in (("A", a), ("B", b)):
        for key in both:
            _readable(f"{name}'s picture {key!r}", pictures[key].data)
    return [Pair(key, a[key].caption or b[key].caption, a[key].data, b[key].data) for key in both]


def _readable(name: str, data: bytes) -> None:
    """A browser would show nothing, and nobody could vote on."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ImagineFlashError(f"{name} cannot be read; draw or copy it again") from None
