"""Two folders of pictures of the same prompts, compared by a model's features: for any teacher and student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ImagineFlashError
from ..environment import write_record
from ..picture_folders import Shown, pictures_in
from .features import Features
from .metrics import frechet_distance, kernel_distance, precision_and_recall, unbiased_frechet_distance

_RESAMPLES = 1000
_NEIGHBOURS = 3


def compare_folders(
    teacher: Path, student: Path, features: Features, *, real: Path | None = None, out: Path | None = None
) -> dict[str, Any]:
    """The student's pictures against the teacher's of the same names; with `real`, both against real pictures.

    fd: Frechet distance of the features, fd_unbiased: extrapolated to infinitely many, where there are enough; kd: squared
    MMD; similarity: cosine of the two pictures of a prompt, on average; clip_score: 100 x cosine of picture and caption, where
    the model reads and all have captions, and its difference with a paired 95 % interval. Written to `out`.json.
    """
    ours, theirs = _named(student), _named(teacher)
    names = [name for name in theirs if name in ours]
    if len(names) <= _NEIGHBOURS:
        raise ImagineFlashError(
            f"{teacher} and {student} have {len(names)} pictures of one name; {_NEIGHBOURS + 1} are the least"
        )
    files = {"teacher": [theirs[name].data for name in names], "student": [ours[name].data for name in names]}
    found = {who: features.of_pictures(each) for who, each in files.items()}
    record: dict[str, Any] = {"pictures": len(names), "dimensions": found["teacher"].shape[1]}
    record["student"] = distances(found["student"], found["teacher"])
    record["student"]["similarity"] = round(float(_cosines(found["student"], found["teacher"]).mean()), 4)
    captions = [theirs[name].caption or ours[name].caption for name in names]
    if features.reads and all(captions):
        record |= _clip_scores(found, features.of_captions(captions))
    if real is not None:
        reference = features.of_pictures([each.data for each in _named(real).values()])
        record["to_real"] = {who: distances(each, reference) for who, each in found.items()}
    if out is not None:
        write_record(out.with_name(f"{out.name}.json"), record)
    return record


def distances(ours: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """Of features (N, D) to those of a reference (M, D)."""
    gaussian = reference.mean(0), np.cov(reference, rowvar=False)
    precision, recall = precision_and_recall(ours, reference, min(_NEIGHBOURS, len(ours) - 1, len(reference) - 1))
    enough = len(ours) >= 2 * (ours.shape[1] + 1)
    return {
        "fd": round(frechet_distance(ours, *gaussian), 4),
        "fd_unbiased": round(unbiased_frechet_distance(ours, *gaussian), 4) if enough else None,
        "kd": round(kernel_distance(ours, reference), 6),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
    }


def as_lines(record: Mapping[str, Any]) -> list[str]:
    """What a person reads of a comparison."""
    lines = [f"{record['pictures']} pairs of pictures, {record['dimensions']} features"]
    blocks = {"student against teacher": record["student"]}
    blocks |= {f"{who} against real pictures": each for who, each in record.get("to_real", {}).items()}
    lines += [
        f"{name}: " + ", ".join(f"{k} {v}" for k, v in block.items() if v is not None) for name, block in blocks.items()
    ]
    if "clip_score" in record:
        scores, (low, high) = record["clip_score"], record["clip_score_interval"]
        lines.append(f"CLIP score: teacher {scores['teacher']}, student {scores['student']}")
        lines.append(f"difference {record['clip_score_difference']} (95 % interval {low} to {high})")
    return lines


def _named(folder: Path) -> dict[str, Shown]:
    if not folder.is_dir() or not (found := pictures_in(folder)):
        raise ImagineFlashError(f"{folder} is no folder of pictures (.png, .jpg, .webp)")
    return found


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _clip_scores(found: Mapping[str, np.ndarray], text: np.ndarray) -> dict[str, Any]:
    """Hessel et al. 2021, as percent of the cosine."""
    each = {who: 100 * _cosines(pictures, text) for who, pictures in found.items()}
    gain = each["student"] - each["teacher"]
    rows = np.random.default_rng(0).integers(len(gain), size=(_RESAMPLES, len(gain)))
    low, high = np.percentile(gain[rows].mean(1), (2.5, 97.5))
    return {
        "clip_score": {who: round(float(scores.mean()), 3) for who, scores in each.items()},
        "clip_score_difference": round(float(gain.mean()), 3),
        "clip_score_interval": [round(float(low), 3), round(float(high), 3)],
    }
