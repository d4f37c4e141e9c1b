"""What a picture is worth beside its caption, by a function that the user names, and over which prompts: T2I-CompBench's lists,
or any others, by category."""

from __future__ import annotations

import io
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from ...core.errors import ImagineFlashError
from .paired import mean_difference

Scorer = Callable[[list[Image.Image], list[str]], Sequence[float]]
_BATCH = 32


def load_scorer(name: str) -> Scorer:
    """MODULE:FUNCTION, also of the folder that the command runs in. The function takes pictures (PIL, RGB) and their captions, a
    batch at a time, and returns a number for each, the more the better. Raises ImagineFlashError."""
    if not all(name.partition(":")):
        raise ImagineFlashError(f"a scorer is MODULE:FUNCTION, such as my_scorer:score, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # of code that is not ours
        raise ImagineFlashError(f"cannot import the scorer {name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ImagineFlashError(f"the scorer {name!r} is no function but {type(found).__name__}")
    return cast(Scorer, found)


def score(scorer: Scorer, files: Sequence[bytes], captions: Sequence[str]) -> np.ndarray:
    """float64 (N,). Raises ImagineFlashError where it does not give a finite number for each picture."""
    found: list[float] = []
    for i in range(0, len(files), _BATCH):
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files[i : i + _BATCH]]
        try:
            given = np.asarray(scorer(pictures, list(captions[i : i + _BATCH])), dtype=np.float64)
        except Exception as error:  # of code that is not ours
            raise ImagineFlashError(f"the scorer failed: {type(error).__name__}: {error}") from error
        if given.shape != (len(pictures),) or not np.isfinite(given).all():
            raise ImagineFlashError(
                f"the scorer must give a finite number for each of {len(pictures)} pictures, got {given.tolist()!r:.80}"
            )
        found.extend(given)
    return np.array(found)


def read_categories(folder: Path) -> dict[str, set[str]]:
    """Category -> its prompts: NAME.txt or, as T2I-CompBench has them, NAME_val.txt, one prompt a line. Raises
    ImagineFlashError."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise ImagineFlashError(f"{folder} holds no lists of prompts; write CATEGORY.txt with one prompt a line")
    try:
        texts = {path.stem.removesuffix("_val"): path.read_text(encoding="utf-8") for path in files}
    except UnicodeDecodeError:
        raise ImagineFlashError(f"a list in {folder} is not UTF-8 text") from None
    return {name: {line.strip() for line in text.splitlines() if line.strip()} for name, text in texts.items()}


def scores_by_category(
    found: Mapping[str, np.ndarray], captions: Sequence[str], categories: Mapping[str, set[str]]
) -> dict[str, dict[str, Any]]:
    """ "all", then each category that a caption belongs to: how many pictures, both means, and their difference with a paired 95 %
    interval. found: "teacher" and "student", (N,) each. Raises ImagineFlashError where no caption is in any list."""
    everything = {"all": np.ones(len(captions), bool)}
    listed = {name: np.array([caption in prompts for caption in captions]) for name, prompts in categories.items()}
    if categories and not any(rows.any() for rows in listed.values()):
        raise ImagineFlashError(f"no caption, such as {captions[0]!r}, stands in the lists of {', '.join(categories)}")
    return {
        name: _paired(found["teacher"][rows], found["student"][rows])
        for name, rows in (everything | listed).items()
        if rows.any()
    }


def _paired(teacher: np.ndarray, student: np.ndarray) -> dict[str, Any]:
    difference, *interval = mean_difference(student, teacher)
    return {
        "pictures": len(student),
        "teacher": round(float(teacher.mean()), 4),
        "student": round(float(student.mean()), 4),
        "difference": difference,
        "interval": interval,
    }
