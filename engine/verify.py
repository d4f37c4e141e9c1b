"""Does this machine draw what torch drew at export? The artifact holds the pictures to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ArtifactError
from ..core.images import psnr
from ..folders.manifests import ReferencePicture
from .engine import Engine
from .request import GenerateRequest


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One reference picture drawn again. psnr: dB against the picture, 100 where equal; levels: the largest difference."""

    reference: ReferencePicture
    psnr: float
    levels: int
    passed: bool


def verify(engine: Engine) -> Iterator[Verified]:
    """Draws every reference picture of the engine's artifact and applies the limits of its manifest.

    Raises ArtifactError for an artifact without pictures or one that cannot be read.
    """
    manifest = engine.artifact
    if not manifest.references:
        raise ArtifactError(f"{engine.folder} holds no reference pictures; export the student again")
    limits = manifest.limits
    for reference in manifest.references:
        height, width = reference.size
        request = GenerateRequest(
            prompt=reference.prompt, steps=reference.steps, seed=reference.seed, height=height, width=width
        )
        got, expected = engine.generate(request).images[0], _read(engine, reference)
        levels, likeness = int(np.abs(got.astype(np.int64) - expected).max()), psnr(got, expected)
        passed = levels <= limits.get("levels", 255) and likeness >= limits.get("psnr", 0.0)
        yield Verified(reference=reference, psnr=likeness, levels=levels, passed=passed)


def _read(engine: Engine, reference: ReferencePicture) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(engine.folder / reference.file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot read {reference.file} of {engine.folder} ({error}); export the student again"
        ) from None
    if pixels.shape != (*reference.size, 3):
        raise ArtifactError(
            f"{reference.file} of {engine.folder} has the size {pixels.shape[:2]}, not {reference.size}"
        )
    return pixels
