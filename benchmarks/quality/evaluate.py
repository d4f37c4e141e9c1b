"""`evaluate`: prompt fidelity and distances of a teacher and its student, on the same prompts and noises, with intervals."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.console import Console

from ...core.errors import ImagineFlashError
from ...distill.models import load_model
from ...distill.progress import progress_bar
from ...distill.recipe import Frozen, Positive
from ...distill.reproducible import fingerprint
from ...folders.files import hash_folder, sha256_file
from ...folders.reading import read_student_manifest
from .comparison import comparison_grid, save_quality
from .judge import FEATURES, FEWEST, Judge, load_judge
from .measure import Measured, PictureStore
from .method import REFERENCE, Method
from .methods import student_table, teacher_table
from .metrics import precision_and_recall, spread
from .paired import Distance, against_teacher, distance_of
from .prompts import NOISE_SEEDS, SPLITS, Prompts, draw_prompts, shares

WIDEST = 46  # letters of a row's name beside its bar
NEIGHBOURS_OF = 5000  # pictures in precision, recall and KID, whose cost grows with the square
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 64, 8


class EvaluationRecipe(Frozen):
    """`evaluate`: on which prompts, and which rows of the table."""

    split: str = "test"
    count: Annotated[int, Field(ge=FEWEST)] = 10_000
    held_out: Positive = 1024
    guidance: Annotated[float, Field(gt=0)] | None = None  # of the teacher; none: that of the student's recipe
    rows: tuple[str, ...] = ()  # by name; none: all


def evaluate(
    teacher_folder: Path,
    student_folder: Path | None,
    judge_file: Path,
    out: Path,
    *,
    split: str = "validation",
    count: int = 10_000,
    held_out: int = 1024,
    guidance: float | None = None,
    only: list[str] | None = None,
    font: Path | None = None,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure every row, write `out`.json and `out`.png; returns the record.

    split: "validation", on which choices are made, or "test", read once per committed model. only: names of rows, the
    teacher's at 25 steps among them always. Pictures are kept in `{out}.run`: the same call goes on where a killed one was, and
    another student of the same teacher finds its teacher's pictures there. console: of the progress bar; by default standard error.
    """
    if count < FEWEST or held_out < 1:
        raise ImagineFlashError(
            f"FD (judge) needs at least {FEWEST} seen and 1 held-out prompts, got {count} and {held_out}"
        )
    if split not in SPLITS:
        raise ImagineFlashError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    judge, judged = load_judge(judge_file)
    judge = judge.to(device)
    of_teacher, of_student, weight = _methods(teacher_folder, student_folder, guidance, font, device)
    methods = choose([*of_teacher, *of_student], only)
    hashes = {"teacher": hash_folder(teacher_folder), "judge": sha256_file(judge_file)}
    prompts = draw_prompts(count, split=split, held_out=False), draw_prompts(held_out, split=split, held_out=True)
    run = out.with_name(f"{out.name}.run")
    store = PictureStore(run / "teacher", fingerprint(hashes, split, weight))
    found = measured([m for m in methods if m in of_teacher], *prompts, judge, store, console)
    if student_folder:
        hashes["student"] = hash_folder(student_folder)
        store = PictureStore(run / f"student-{hashes['student'][:12]}", fingerprint(hashes, split, weight))
        found |= measured([m for m in methods if m in of_student], *prompts, judge, store, console)
    record = {
        "question": "How near to its teacher does the student come in 1, 2 and 3 network calls?",
        "schema": 2,
        "split": split,
        "n": {"seen": count, "held_out": held_out},
        "guidance": weight,
        "seeds": {"prompts": SPLITS[split], "noise": NOISE_SEEDS[split]},
        "sha256": hashes,
        "judge_accuracy": judged,
        "rows": compare(methods, found, judge),
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "device": str(device)},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    }
    save_quality(record, comparison_grid([method for method in methods if method.shown], emoji_font=font), out)
    return record


def _methods(
    teacher_folder: Path, student_folder: Path | None, guidance: float | None, font: Path | None, device: Any
) -> tuple[list[Method], list[Method], float]:
    """The rows that need no student, the student's, and the teacher's guidance: by default that of the student's recipe."""
    teacher = load_model(teacher_folder).to(device)
    if student_folder is None:
        weight = 2.0 if guidance is None else guidance
        return teacher_table(teacher, weight, font), [], weight
    student, manifest = load_model(student_folder).to(device), read_student_manifest(student_folder)
    weight = float(np.mean(manifest.recipe.get("guidance", [2.0]))) if guidance is None else guidance
    of_student = student_table(student, manifest.step_plans, manifest.sampler)
    return teacher_table(teacher, weight, font), of_student, weight


def choose(methods: list[Method], only: list[str] | None) -> list[Method]:
    """The rows named, and those that all comparisons need."""
    if not only:
        return methods
    known = {m.name for m in methods}
    for name in only:
        if name not in known:
            raise ImagineFlashError(f"no row {name!r}; there are: {'; '.join(m.name for m in methods)}")
    return [m for m in methods if m.name in {*only, REFERENCE, "rendered scenes", "autoencoder"}]


Kinds = dict[str, Measured]


def measured(
    methods: list[Method], seen: Prompts, unseen: Prompts, judge: Judge, store: PictureStore, console: Console | None
) -> dict[str, Kinds]:
    """By method, pictures of the seen prompts, of the held-out ones, and of a few prompts with several noises each."""
    chosen = [row for row in range(min(DIVERSITY_PROMPTS, len(seen))) for _ in range(DIVERSITY_SEEDS)]
    many = replace(
        seen,
        captions=[seen.captions[r] for r in chosen],
        scenes=[seen.scenes[r] for r in chosen],
        index=[seen.index[r] for r in chosen],
        seeds=[seen.seeds[0] + 900_000 + i for i in range(len(chosen))],
    )
    found: dict[str, Kinds] = {}
    with progress_bar(console, width=WIDEST, transient=True) as bar:
        for method in methods:
            kinds = {"seen": seen, "held_out": unseen} | ({"diversity": many} if method.network_calls else {})
            found[method.name] = {kind: store.measure(method, part, kind, judge, bar) for kind, part in kinds.items()}
    return found


def compare(
    methods: list[Method], found: dict[str, Kinds], judge: Judge, distances: dict[str, Distance] | None = None
) -> list[dict[str, Any]]:
    """The rows of the record; every difference is to the teacher at 25 steps, over the same prompts and noises. distances: those
    known already, to which the rows' own are added."""
    distances = {} if distances is None else distances
    reference = judge.reference_mean.double().numpy(), judge.reference_covariance.double().numpy()
    real = found["rendered scenes"]["seen"].features[:NEIGHBOURS_OF] if "rendered scenes" in found else None
    for name in dict.fromkeys((REFERENCE, *(method.name for method in methods))):
        if name not in distances:
            beside = None if name == "rendered scenes" else real
            distances[name] = distance_of(found[name]["seen"].features, reference, beside)
    teacher, clean = found[REFERENCE]["seen"], found["autoencoder"]["seen"].latents
    rows = []
    for method in methods:
        ours, own = (kinds := found[method.name])["seen"], distances[method.name]
        row: dict[str, Any] = {
            "method": method.name,
            "network_calls": method.network_calls,
            "seen": shares(ours.marks),
            "held_out": shares(kinds["held_out"].marks),
            "fd_judge": round(own.plain, 3),
            "fd_judge_unbiased": round(own.value, 3),
            "fd_interval": own.interval,
            "sharpness": round(float(ours.sharpness.mean()), 1),
            "milliseconds_per_image": round(1000 * ours.seconds / len(ours.marks), 2),
        }
        if own.terms is not None and real is not None:
            precision, recall = precision_and_recall(ours.features[:NEIGHBOURS_OF], real, paired=True)
            row |= {
                "kd_judge": round(float(own.terms.mean()), 4),
                "precision": round(precision, 4),
                "recall": round(recall, 4),
            }
        if "diversity" in kinds:
            grouped = kinds["diversity"].features.reshape(-1, DIVERSITY_SEEDS, FEATURES)
            row["diversity"] = round(spread(grouped), 3)
        if ours.latents.shape[1:] == clean.shape[1:]:
            row["detail_deviation"] = round(detail_deviation(ours.latents, clean), 4)
        if method.network_calls and method.name != REFERENCE:
            row |= against_teacher(ours, teacher, own, distances[REFERENCE])
        rows.append(row)
    return rows


def detail_deviation(latents: np.ndarray, clean: np.ndarray) -> float:
    """Deviation of the finer latent channels (all but the first sixth) over that of real pictures' latents, on average."""
    first = -(-latents.shape[1] // 6)
    ours, real = (x[:, first:].astype(np.float32).std(axis=(0, 2, 3)) for x in (latents, clean))
    return float((ours / real).mean())
