"""Whether a model draws well in bfloat16 on this processor: judged by its own reference pictures, once."""

from __future__ import annotations

import hashlib
import json
import logging
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

LOG = logging.getLogger(__name__)
MIN_PSNR = 35.0  # dB of the worst reference picture, as the export's gate asks of float16


def bf16_is_accurate(folder: Path, manifest: ArtifactManifest) -> bool:
    """Whether OpenVINO computes in bfloat16 here, and draws every reference picture with a PSNR of 35 dB or more.

    The answer is kept in the cache folder, by artifact, library and processor; without such a folder or reference pictures
    nothing is drawn, and the answer is no. So it is after an error, such as too little memory, which is logged and not kept.
    """
    from .backends.openvino import OpenvinoBackend, processor_with_bf16

    processor, cache = processor_with_bf16(), cache_folder("precision")
    if processor is None or cache is None or not manifest.references:
        return False

    def lowest() -> float:
        backend = OpenvinoBackend(folder, manifest, BackendOptions(precision="bf16"))
        tokenizer = PromptTokenizer.load(folder, manifest.tokenizers)
        return lowest_psnr(folder, manifest, lambda asked: reference_generate(backend, tokenizer, manifest, asked)[0])

    return is_remembered(cache, f"bf16 {processor} {known_sha256(folder / ARTIFACT_FILE)}", lowest)


def is_remembered(cache: Path, key: str, measure: Callable[[], float]) -> bool:
    """Whether the PSNR is high enough that `measure` gave under this key, now or when it was last asked; 0 is no PSNR, and not
    kept."""
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["psnr"]) >= MIN_PSNR
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: measure
    if not (psnr := measure()):
        return False
    try:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps({"psnr": psnr, "key": key}), encoding="utf-8")
    except (OSError, ImagineFlashError):
        return False
    return psnr >= MIN_PSNR


def lowest_psnr(
    folder: Path, manifest: ArtifactManifest, draw: Callable[[GenerateRequest], NDArray[np.uint8]]
) -> float:
    """Of the reference pictures, dB; 0, and a line in the log, where there is none to compare with, or nothing is drawn."""
    try:
        return min(found.psnr for found in verify(folder, manifest, draw))
    except ImagineFlashError as error:
        LOG.warning("bf16 is not judged, and not used this time: %s", error)
        return 0.0
