"""What an export leaves to look at: reference pictures in the artifact, and the failing ones beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..folders.manifests import ReferencePicture, size_name
from .cases import Case
from .ledger import Ledger

REFERENCES = "references"
SHOWN = 12  # images of a report


def save_references(folder: Path, cases: list[Case], *, is_controlled: bool) -> list[ReferencePicture]:
    """Torch's picture of the first prompt of every size and plan, lossless, and the conditioning picture that it was drawn under,
    at scale 1, where the model reads one."""
    (folder / REFERENCES).mkdir()
    kept: dict[str, ReferencePicture] = {}
    for case in cases:
        for steps, images in case.images.items():
            file = f"{REFERENCES}/{size_name(case.size)}_{steps}.png"
            if file not in kept:
                Image.fromarray(images[0].numpy()).save(folder / file)
                kept[file] = ReferencePicture(
                    file=file,
                    prompt=case.prompts[0],
                    seed=case.seed,
                    steps=steps,
                    size=case.size,
                    condition=_save_condition(folder, case) if is_controlled else None,
                )
    return list(kept.values())


def _save_condition(folder: Path, case: Case) -> str:
    """The conditioning picture of a case's first prompt."""
    file = f"{REFERENCES}/{size_name(case.size)}_condition.png"
    Image.fromarray(case.condition[0].numpy()).save(folder / file)
    return file


def write_report(folder: Path, ledger: Ledger) -> None:
    """Replaces `folder`: report.json with every figure and failure, and torch's and the graph's images side by side."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, failure in enumerate([f for f in ledger.failures if f.got is not None][:SHOWN]):
        assert failure.steps is not None and failure.got is not None
        expected = failure.case.images[failure.steps].numpy()
        _save(folder / f"{number:02}_{failure.graph}_torch.png", expected)
        _save(folder / f"{number:02}_{failure.graph}_onnx.png", failure.got)
    report = {"failures": [failure.message for failure in ledger.failures], "errors": ledger.errors}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, images: NDArray[np.uint8]) -> None:
    """A batch as one row."""
    Image.fromarray(np.concatenate(list(images), axis=1)).save(path)
