"""Whether a model draws well in bfloat16 on this processor: judged by its own reference pictures, once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ImagineFlashError
from ..folders.files import ARTIFACT_FILE, atomic_file, cache_folder, known_sha256
from ..folders.manifests import ArtifactManifest
from .backends.base import BackendOptions
from .reference import reference_generate
from .request import GenerateRequest
from .tokenizer import PromptTokenizer
from .verify import verify

MIN_PSNR = 35.0  # dB of the worst reference picture, as the export's gate asks of float16


def bf16_is_accurate(folder: Path, manifest: ArtifactManifest) -> bool:
    """Whether OpenVINO computes in bfloat16 here, and draws every reference picture with a PSNR of 35 dB or more.

    The answer is kept in the cache folder, by artifact, library and processor; without such a folder nothing is drawn, and
    the answer is no.
    """
    from .backends.openvino import OpenvinoBackend, processor_with_bf16

    processor, cache = processor_with_bf16(), cache_folder("precision")
    if processor is None or cache is None:
        return False

    def lowest() -> float:
        backend = OpenvinoBackend(folder, manifest, BackendOptions(precision="bf16"))
        tokenizer = PromptTokenizer.load(folder, manifest.tokenizers)
        return lowest_psnr(folder, manifest, lambda asked: reference_generate(backend, tokenizer, manifest, asked)[0])

    return is_remembered(cache, f"bf16 {processor} {known_sha256(folder / ARTIFACT_FILE)}", lowest)


def is_remembered(cache: Path, key: str, measure: Callable[[], float]) -> bool:
    """Whether the PSNR is high enough that `measure` gave under this key, now or when it was last asked."""
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["psnr"]) >= MIN_PSNR
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: measure
    psnr = measure()
    try:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps({"psnr": psnr, "key": key}), encoding="utf-8")
    except (OSError, ImagineFlashError):
        return False
    return psnr >= MIN_PSNR


def lowest_psnr(
    folder: Path, manifest: ArtifactManifest, draw: Callable[[GenerateRequest], NDArray[np.uint8]]
) -> float:
    """Of the reference pictures, dB; 0 where there is none to compare with, or nothing is drawn."""
    try:
        return min(found.psnr for found in verify(folder, manifest, draw))
    except ImagineFlashError:
        return 0.0
