"""Pictures of one's own as latents, encoded once and kept, in groups of one size; their captions are the prompts."""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from rich.console import Console

from ...core.errors import ImagineFlashError
from ...folders.sizes import Size, size_name
from ..progress import progress_bar
from ..reproducible import fingerprint
from .captioned import Captioned, PictureSource
from .kept import kept
from .latents import encoder_weights

if TYPE_CHECKING:
    from ..models import Model

_READ = 64  # pictures that are decoded at a time, by as many threads as there are cores
_PIXELS = 2**20  # of one call of the autoencoder: four pictures at 512x512
_NAMED = 3
_TURNS = {  # by EXIF's orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureSet:
    """captions: in the order of the latents. latents: one tensor (N, C, h, w) float16 per size of picture."""

    captions: list[str]
    latents: list[torch.Tensor]

    @property
    def digest(self) -> str:
        """A SHA-256 of what is trained on."""
        content = hashlib.sha256(json.dumps(self.captions).encode())
        for group in self.latents:
            content.update(group.contiguous().numpy().data)
        return content.hexdigest()


def picture_set(model: Model, source: PictureSource, path: Path, *, most: int, console: Console) -> PictureSet:
    """The first `most` pictures of a source, kept in `path` and used again while neither they nor the autoencoder changed.

    What cannot be read or has no caption is left out and said. ImagineFlashError where nothing is left.
    """
    sizes = bucket_sizes(model) if source.buckets else [model.stages.default_size]
    identity = fingerprint(encoder_weights(model), source.identity(), sizes, most)
    found = kept(path, identity, lambda: _Encoding(model, source, sizes).all(most, console))
    captions = json.loads(found.pop("captions").numpy().tobytes())
    return PictureSet(captions, [found[name] for name in sorted(found)])


def bucket_sizes(model: Model) -> list[Size]:
    """Sizes of about the area of the teacher's, never above it, from twice as wide to twice as high, the teacher's among
    them: sides in sixteenths of its side, or the least that the network takes (Novel AI's aspect buckets)."""
    stages = model.stages
    side, least = max(stages.default_size), stages.any_multiple or stages.multiple
    step = -(-side // 16 // least) * least or least
    area, found = stages.default_size[0] * stages.default_size[1], {stages.default_size}
    for height in range(step, 2 * side, step):
        width = area // height // step * step
        if width and 0.5 <= height / width <= 2:
            found.add((height, width))
    return sorted(found)


@dataclass
class _Encoding:
    """One pass over a source, and what was found on it."""

    model: Model
    source: PictureSource
    sizes: list[Size]
    waiting: dict[Size, list[np.ndarray]] = field(default_factory=dict)  # for the autoencoder
    latents: dict[Size, list[torch.Tensor]] = field(default_factory=dict)
    captions: dict[Size, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def all(self, most: int, console: Console) -> dict[str, torch.Tensor]:
        """Latents by size, and the captions in their order."""
        rows = islice(self.source, most)
        with progress_bar(console, transient=True) as bar, ThreadPoolExecutor() as pool:
            task = bar.add_task("encoding pictures", total=None)
            while part := list(islice(rows, _READ)):
                for each, read in zip(part, pool.map(self._read, part), strict=True):
                    self._add(each, *read)
                bar.update(task, advance=len(part))
        for size in self.waiting:
            self._encode(size)
        self._say(console)
        sizes = sorted(self.latents)
        texts = json.dumps([caption for size in sizes for caption in self.captions[size]]).encode()
        found = {f"latents {height:05}x{width:05}": torch.cat(self.latents[height, width]) for height, width in sizes}
        return found | {"captions": torch.frombuffer(bytearray(texts), dtype=torch.uint8)}

    def _read(self, each: Captioned) -> tuple[Size, np.ndarray | None, str]:
        """The size that the picture gets, its pixels (H, W, 3) uint8, or why it cannot be read."""
        try:
            data = each.picture if isinstance(each.picture, bytes) else each.picture.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                picture = _opaque(_upright(image))
        except Exception as error:  # whatever damaged bytes make a reader raise: one picture is not the set
            return self.sizes[0], None, _reason(error)
        shape = np.log(picture.height / picture.width)
        size = min(self.sizes, key=lambda size: abs(np.log(size[0] / size[1]) - shape))
        return size, np.asarray(ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)), ""

    def _add(self, each: Captioned, size: Size, pixels: np.ndarray | None, error: str) -> None:
        if pixels is None:
            self.unread.append(f"{each.name} ({error})")
        elif not each.caption:
            self.silent.append(each.name)
        else:
            self.waiting.setdefault(size, []).append(pixels)
            self.captions.setdefault(size, []).append(each.caption)
            if len(self.waiting[size]) * size[0] * size[1] >= _PIXELS:
                self._encode(size)

    @torch.no_grad()
    def _encode(self, size: Size) -> None:
        if not (pixels := self.waiting[size]):
            return
        images = torch.from_numpy(np.stack(pixels)).to(self.model.device)
        latents = self.model.stages.image_encoder(images).half().cpu()
        if not latents.isfinite().all():
            raise ImagineFlashError(
                "the autoencoder gives NaN in half precision; take teacher_dtype: bfloat16 or float32"
            )
        self.latents.setdefault(size, []).append(latents)
        self.waiting[size] = []

    def _say(self, console: Console) -> None:
        """How many pictures there are, and which were left out; ImagineFlashError where all were."""
        left = {"cannot be read": self.unread, "have no readable caption": self.silent}
        reasons = [f"{len(names)} {why}: {_some(names)}" for why, names in left.items() if names]
        if not self.captions:
            why = f"none of them is of use ({'; '.join(reasons)})" if reasons else "none is there"
            raise ImagineFlashError(f"pictures of {self.source.place}: {why}; each needs a file and a caption")
        counts = [f"{len(texts)} of {size_name(size)}" for size, texts in sorted(self.captions.items())]
        console.print(f"pictures: {', '.join(counts)}" + "".join(f"; left out: {reason}" for reason in reasons))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _reason(error: Exception) -> str:
    """In a few words, without the address of a buffer."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    said = "no picture" if isinstance(error, UnidentifiedImageError) else str(error).strip()
    return (said or type(error).__name__).splitlines()[0]


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says, or as it is where nobody can read that. ImageOps.exif_transpose also writes the other tags
    anew, and raises where one of them is odd."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # struct.error, TypeError and others: whatever is written there
        return image
    return image if turn is None else image.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
    """RGB, what is transparent on white. ValueError for numbers of which nobody says what is white."""
    if image.mode == "F":
        raise ValueError("floating-point numbers, no colours")
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if "transparency" in image.info:
            image.info["transparency"] //= 257
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
