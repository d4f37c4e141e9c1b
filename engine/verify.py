"""Does this machine draw what torch drew at export? The artifact holds the pictures to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ArtifactError
from ..core.images import psnr
from ..folders.manifests import ArtifactManifest, ReferencePicture, Size
from .request import GenerateRequest


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One reference picture drawn again. psnr: dB against the picture, 100 where equal; levels: the largest difference."""

    reference: ReferencePicture
    psnr: float
    levels: int
    passed: bool


def verify(
    folder: Path,
    manifest: ArtifactManifest,
    draw: Callable[[GenerateRequest], NDArray[np.uint8]],
    draws: Callable[[Size], bool] = lambda size: True,
) -> Iterator[Verified]:
    """Has every reference picture of an artifact drawn, (H, W, 3), but those of sizes that it `draws` not, and applies the limits
    of its manifest.

    Raises ArtifactError for an artifact without pictures or one that cannot be read.
    """
    if not manifest.references:
        raise ArtifactError(f"{folder} holds no reference pictures; export the student again")
    limits = manifest.limits
    for reference in filter(lambda reference: draws(reference.size), manifest.references):
        height, width = reference.size
        request = GenerateRequest(
            prompt=reference.prompt,
            steps=reference.steps,
            seed=reference.seed,
            height=height,
            width=width,
            condition=None if reference.condition is None else _read(folder, reference.condition, reference.size),
        )
        got, expected = draw(request), _read(folder, reference.file, reference.size)
        levels, likeness = int(np.abs(got.astype(np.int64) - expected).max()), psnr(got, expected)
        passed = levels <= limits.get("levels", 255) and likeness >= limits.get("psnr", 0.0)
        yield Verified(reference=reference, psnr=likeness, levels=levels, passed=passed)


def _read(folder: Path, file: str, size: Size) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(folder / file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {file} of {folder} ({error}); export the student again") from None
    if pixels.shape != (*size, 3):
        raise ArtifactError(f"{file} of {folder} has the size {pixels.shape[:2]}, not {size}")
    return pixels
