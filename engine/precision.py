"""Which precision "auto" is: bfloat16 where the processor computes in it and the model bears it, by its own pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ImagineFlashError
from ..folders.files import atomic_file

if TYPE_CHECKING:
    from .engine import Engine

ENOUGH = 35.0  # dB of the worst reference picture, as the export's gate asks of float16


def bears(precision: str, load: Callable[[], Engine], *, key: str, cache: Path | None) -> bool:
    """Whether the engine that `load` gives draws the reference pictures of its artifact with a PSNR of 35 dB or more.

    The answer is kept in the folder `cache` under `key`, which names artifact, library and processor; without a folder to
    keep it in nothing is drawn, and the answer is no.
    """
    if cache is None:
        return False
    file = cache / f"{hashlib.sha256(f'{precision} {key}'.encode()).hexdigest()[:32]}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["psnr"]) >= ENOUGH
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: measure
    psnr = _worst(load)
    try:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps({"psnr": psnr, "precision": precision}), encoding="utf-8")
    except (OSError, ImagineFlashError):
        return False
    return psnr >= ENOUGH


def _worst(load: Callable[[], Engine]) -> float:
    from .verify import verify

    try:
        with load() as engine:
            return min(found.psnr for found in verify(engine))
    except ImagineFlashError:  # no pictures to compare with, or NaN
        return 0.0
