"""Two folders of pictures of the same prompts, compared by a model's features: for any teacher and student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ImagineFlashError
from ..environment import write_record
from ..picture_folders import METADATA, Shown, pictures_in, same_captions
from .features import Features
from .metrics import frechet_distance, kernel_distance, precision_and_recall, unbiased_sample_distance
from .scorers import load_scorer, score, scores_by_category

_NEIGHBOURS = 3


def pairs_of(teacher: Path, student: Path) -> dict[str, tuple[Shown, Shown]]:
    """The two pictures of each name that both folders have. Raises ImagineFlashError where they are too few."""
    theirs, ours = _named(teacher), _named(student)
    same_captions(theirs, ours)
    pairs = {name: (theirs[name], ours[name]) for name in theirs if name in ours}
    if len(pairs) <= _NEIGHBOURS:
        raise ImagineFlashError(
            f"{teacher} and {student} have {len(pairs)} pictures of one name; {_NEIGHBOURS + 1} are the least"
        )
    return pairs


def compare_folders(
    teacher: Path,
    student: Path,
    features: Features,
    *,
    real: Path | None = None,
    scorer: str | None = None,
    categories: Mapping[str, set[str]] | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """The student's pictures against the teacher's of the same names; with `real`, both against real pictures.

    fd: Frechet distance of the features, fd_unbiased: extrapolated to infinitely many, where there are enough; kd: squared MMD;
    of the student against the teacher kd, precision and recall leave out the pairs of one prompt, which are no independent draws;
    similarity: cosine of the two pictures of a prompt, on average; scores: of all pictures and of each category's, with paired
    95 % intervals of the differences: by `scorer`, see scorers.py, else CLIP's, 100 x cosine of picture and caption, where the
    model reads and all have captions. Written to `out`.json.
    """
    pairs = pairs_of(teacher, student)
    score_by = None if scorer is None else load_scorer(scorer)
    files = {
        who: {str(folder / name): pair[i].data for name, pair in pairs.items()}
        for i, (who, folder) in enumerate((("teacher", teacher), ("student", student)))
    }
    captions = [theirs.caption or ours.caption for theirs, ours in pairs.values()]
    if (scorer or categories) and not all(captions):
        raise ImagineFlashError(f"a scorer and categories need captions; {teacher / METADATA} does not have all")
    found = {who: features.of_pictures(each) for who, each in files.items()}
    record: dict[str, Any] = {"pictures": len(pairs), "dimensions": found["teacher"].shape[1]}
    record["student"] = distances(found["student"], found["teacher"], paired=True)
    record["student"]["similarity"] = round(float(_cosines(found["student"], found["teacher"]).mean()), 4)
    scores: dict[str, np.ndarray] = {}
    if score_by is not None:
        scores = {who: score(score_by, list(each.values()), captions) for who, each in files.items()}
    elif features.reads and all(captions):  # Hessel et al. 2021, as percent of the cosine
        text = features.of_captions(captions)
        scores = {who: 100 * _cosines(pictures, text) for who, pictures in found.items()}
    elif categories:
        raise ImagineFlashError(f"{features.name} does not read captions; categories need a CLIP model or --scorer")
    if scores:
        record["scores"] = {"of": scorer or "CLIP score", **scores_by_category(scores, captions, categories or {})}
    if real is not None:
        reference = features.of_pictures({str(real / name): each.data for name, each in _named(real).items()})
        record["to_real"] = {who: distances(each, reference) for who, each in found.items()}
    if out is not None:
        write_record(out.with_name(f"{out.name}.json"), record)
    return record


def distances(ours: np.ndarray, reference: np.ndarray, *, paired: bool = False) -> dict[str, float | None]:
    """Of features (N, D) to those of a reference (M, D). paired: row i of both is of one prompt, which is left out where only
    independent draws tell of two distributions."""
    gaussian = reference.mean(0), np.cov(reference, rowvar=False)
    fewest = min(len(ours), len(reference))
    precision, recall = precision_and_recall(ours, reference, min(_NEIGHBOURS, fewest - 1), paired=paired)
    enough = fewest >= 4 * (ours.shape[1] + 1)
    return {
        "fd": round(frechet_distance(ours, *gaussian), 4),
        "fd_unbiased": round(unbiased_sample_distance(ours, reference), 4) if enough else None,
        "kd": round(kernel_distance(ours, reference, paired=paired), 6),
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
    scores = dict(record.get("scores", {}))
    of = scores.pop("of", "")
    for name, each in scores.items():
        low, high = each["interval"]
        what = of if name == "all" else f"{of}, {name} ({each['pictures']} pictures)"
        said = f"teacher {each['teacher']}, student {each['student']}"
        lines.append(f"{what}: {said}, difference {each['difference']} (95 % interval {low} to {high})")
    return lines


def _named(folder: Path) -> dict[str, Shown]:
    if not folder.is_dir() or not (found := pictures_in(folder)):
        raise ImagineFlashError(f"{folder} is no folder of pictures (.png, .jpg, .webp)")
    return found


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
