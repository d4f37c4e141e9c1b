"""Which pictures the runtime's benchmarks draw, and how near they must come to those that the artifact was exported with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ImagineFlashError
from ..engine import Engine, GenerateRequest
from ..engine.precision import MIN_PSNR
from ..folders.manifests import ArtifactManifest
from .schema import Check, compare

Limits = Mapping[str, float]  # "levels": largest difference of 255; "psnr": dB
ONE_LEVEL: Limits = {"levels": 1.0}
WORDS = "apple boat cat dog fish fox house lion moon mushroom owl pig robot rose star tree"


def drawn_by_torch(folder: Path, manifest: ArtifactManifest) -> dict[int, tuple[GenerateRequest, NDArray[np.uint8]]]:
    """steps -> a request at the first size, and the (H, W, 3) that torch drew for it at export. Raises ImagineFlashError."""
    found = {
        reference.steps: (
            GenerateRequest(prompt=reference.prompt, steps=reference.steps, seed=reference.seed),
            read_picture(folder / reference.file),
        )
        for reference in manifest.references
        if reference.size == manifest.image_size
    }
    if not found:
        raise ImagineFlashError(f"{folder} holds no reference pictures to check against; export the student again")
    return found


def read_picture(file: Path) -> NDArray[np.uint8]:
    """The (H, W, 3) in a file. Raises ImagineFlashError."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ImagineFlashError(f"cannot read the picture {file} ({error}); measure again") from None


def different_requests(manifest: ArtifactManifest, count: int, steps: int) -> list[GenerateRequest]:
    """As many requests, of different seeds and as many different prompts as there are words that the model knows."""
    known = (
        sorted({word for spec in manifest.tokenizers for word in spec.known_words if word.isalpha()}) or WORDS.split()
    )
    return [GenerateRequest(prompt=known[i % len(known)], steps=steps, seed=100 + i) for i in range(count)]


def precision_of(engine: Engine) -> str:
    """What the engine's network computes in: the backend's choice, or the graphs' own."""
    return getattr(engine.backend, "precision", engine.artifact.precision)


def limits_of(manifest: ArtifactManifest, precision: str) -> Limits:
    """What a picture may differ by: the artifact's recorded limit, or 35 dB where a backend computes in less than it."""
    if precision != manifest.precision:
        return {"psnr": MIN_PSNR}
    return {name: manifest.limits[name] for name in ("levels", "psnr") if manifest.limits.get(name)}


def check_pictures(
    got: NDArray[np.uint8], expected: NDArray[np.uint8], limits: Limits, reference: str = "torch's picture"
) -> Check:
    """The worst of N pictures (N, H, W, 3): by their largest difference where `limits` has "levels", else by their
    root-mean-square difference, which a PSNR of P dB keeps at 255 / 10^(P / 20) levels. Neither given: one level."""
    if "levels" in limits or "psnr" not in limits:
        return compare(f"levels of 255 from {reference}", got, expected, limits.get("levels", 1.0))
    db, error = limits["psnr"], np.inf
    if got.shape == expected.shape:
        squares = np.square(got.astype(np.float64) - expected).mean(axis=(-3, -2, -1))
        error = float(np.sqrt(squares.max()))
    return Check(what=f"RMS levels from {reference} ({db:g} dB)", error=error, tolerance=255 / 10 ** (db / 20))
