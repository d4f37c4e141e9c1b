"""`evaluate`: prompt fidelity and FD (judge) of a teacher and its student, on the same prompts and seeds."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..core.artifact import atomic_file, hash_folder, read_student_manifest, sha256_file
from ..core.errors import ImagineFlashError
from ..core.plan import StepPlan
from ..core.update import UpdateTable, update_table
from ..distill.data.emoji import Caption, Scene, caption_at
from ..distill.grids import to_pixels
from ..distill.networks import Networks, load_networks, noise_of
from .comparison import comparison_grid
from .judge import FEATURES, Judge, load_judge

PROMPT_SEED, NOISE_SEED = 101, 1_000_000
SUBSET_SIZES, SUBSETS = 10, 8  # of the extrapolation to infinitely many pictures
FEWEST = 2 * (FEATURES + 1)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table: networks, the update table of its plan, and its guidance (None: unguided, one call a step)."""

    name: str
    networks: Networks
    table: UpdateTable
    guidance: float | None


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Captions with the scenes that they describe and the seed of each picture's noise."""

    captions: list[Caption]
    scenes: list[Scene]
    seeds: list[int]


def draw_prompts(count: int, *, held_out: bool) -> Prompts:
    """`count` captions with noise of their own; held-out ones always state the relation, since composition is their point."""
    captions, scenes, index = [], [], 0
    while len(captions) < count:
        scene, caption, _ = caption_at(PROMPT_SEED, index, held_out=held_out)
        index += 1
        if caption.states_axis or not held_out:
            captions.append(caption)
            scenes.append(scene)
    first = NOISE_SEED * (2 if held_out else 1)
    return Prompts(captions=captions, scenes=scenes, seeds=list(range(first, first + count)))


def fidelity(prompts: Prompts, seen: list[Scene]) -> dict[str, float]:
    """Share of pictures that show what their caption states: object(s), relation, background, and all of it together.

    What a caption leaves to chance does not count. A relation is right if the axis is, and the order where the objects are.
    """
    rows: dict[str, list[bool]] = {"object": [], "relation": [], "background": [], "all": []}
    for caption, wanted, found in zip(prompts.captions, prompts.scenes, seen, strict=True):
        objects = sorted(wanted.objects) == sorted(found.objects)
        stated = {"object": objects}
        if caption.states_axis:
            stated["relation"] = wanted.axis == found.axis and (not objects or wanted.objects == found.objects)
        if caption.states_background:
            stated["background"] = wanted.background == found.background
        for name, right in stated.items():
            rows[name].append(right)
        rows["all"].append(all(stated.values()))
    return {name: round(float(np.mean(values)), 4) for name, values in rows.items() if values}


def frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of Gaussians (Heusel et al. 2017, eq. 6); features (N, D) against a reference."""
    own_mean, own = features.mean(0), np.cov(features, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ own @ root), 0, None)).sum()
    return float(((own_mean - mean) ** 2).sum() + np.trace(own) + np.trace(covariance) - 2 * cross)


def unbiased_frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The distance that infinitely many samples would have (Chong & Forsyth 2020, section 4): subsets of several sizes are
    measured, and the line through distance against 1 / size is read at 0. features (N, D), N at least 2 (D + 1)."""
    count, dimensions = features.shape
    draw = np.random.default_rng(0)
    sizes = np.linspace(max(count // 4, dimensions + 1), count, SUBSET_SIZES).astype(int)
    distances = [
        np.mean([frechet_distance(features[draw.permutation(count)[:size]], mean, covariance) for _ in range(SUBSETS)])
        for size in sizes
    ]
    return float(np.polyfit(1.0 / sizes, distances, 1)[1])


@torch.no_grad()
def generate(method: Method, prompts: Prompts, batch: int = 64) -> np.ndarray:
    """(N, H, W, 3) uint8, in order; every method gets the same noise for the same prompt."""
    pictures, networks = [], method.networks
    uncond = networks.embed([""]) if method.guidance is not None else None
    for first in track(range(0, len(prompts.seeds), batch), description=f"{method.name:34}", transient=True):
        noise = noise_of(prompts.seeds[first : first + batch], networks.latent_shape)
        text = networks.embed([c.text for c in prompts.captions[first : first + batch]])
        x0 = networks.sample(noise, text, method.table, uncond=uncond, guidance=method.guidance or 1.0)
        pictures.append(to_pixels(networks.decode(x0)))
    return np.concatenate(pictures)


def methods_of(teacher: Networks, student: Networks, plans: dict[int, StepPlan], guidance: float) -> list[Method]:
    """The rows of the table: the guided teacher at 25 and 3 steps, the student's plans with and without noise correction."""
    longest = teacher.schedule.num_train_timesteps
    rows = [
        Method(
            name=f"teacher, {steps} steps", networks=teacher, guidance=guidance,
            table=update_table(
                teacher.schedule, StepPlan.trailing(steps, longest), teacher.prediction_type, noise_correction=False
            ),
        )
        for steps in (25, 3)
    ]  # fmt: skip
    for corrected in (True, False):
        for steps, plan in sorted(plans.items(), reverse=True):
            table = update_table(student.schedule, plan, student.prediction_type, noise_correction=corrected)
            name = f"student, {steps} step{'s' if steps > 1 else ''}{'' if corrected else ', no noise correction'}"
            rows.append(Method(name=name, networks=student, table=table, guidance=None))
    return rows


def evaluate(
    teacher_folder: Path, student_folder: Path, judge_file: Path, out: Path, *, count: int = 2048, held_out: int = 256,
    guidance: float | None = None, console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every row, print the table, write `out`.json and `out`.png; returns the record."""
    if count < FEWEST or held_out < 1:
        raise ImagineFlashError(
            f"FD (judge) needs at least {FEWEST} seen and 1 held-out prompts, got {count} and {held_out}"
        )
    judge, judged = load_judge(judge_file)
    manifest = read_student_manifest(student_folder)
    teacher, student = load_networks(teacher_folder), load_networks(student_folder)
    plans = manifest.step_plans
    weight = guidance if guidance is not None else float(np.mean(manifest.recipe.get("guidance", [2.0])))
    methods = methods_of(teacher, student, plans, weight)
    seen, unseen = draw_prompts(count, held_out=False), draw_prompts(held_out, held_out=True)
    rows = [_measure(method, judge, seen, unseen) for method in methods]
    record = {
        "question": "How near to its teacher does the student come in 1, 2 and 3 network calls?",
        "n": {"seen": count, "held_out": held_out}, "seeds": {"prompts": PROMPT_SEED, "noise": NOISE_SEED},
        "guidance": weight,
        "sha256": {
            "teacher": hash_folder(teacher_folder), "student": hash_folder(student_folder), "judge": sha256_file(judge_file),
        },
        "judge_accuracy": judged, "rows": rows,
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    }  # fmt: skip
    _write(record, methods, out)
    (console or Console()).print(as_rich(record))
    return record


def _measure(method: Method, judge: Judge, seen: Prompts, unseen: Prompts) -> dict[str, Any]:
    started = time.monotonic()
    pictures = generate(method, seen)
    seconds = time.monotonic() - started
    features, scenes = judge.read(pictures)
    _, scenes_unseen = judge.read(generate(method, unseen))
    reference = judge.reference_mean.double().numpy(), judge.reference_covariance.double().numpy()
    return {
        "method": method.name, "network_calls": len(method.table) * (2 if method.guidance is not None else 1),
        "seen": fidelity(seen, scenes), "held_out": fidelity(unseen, scenes_unseen),
        "fd_judge": round(frechet_distance(features, *reference), 3),
        "fd_judge_unbiased": round(unbiased_frechet_distance(features, *reference), 3),
        "milliseconds_per_image": round(1000 * seconds / len(pictures), 2),
    }  # fmt: skip


def _write(record: dict[str, Any], methods: list[Method], out: Path) -> None:
    picture = comparison_grid(methods)
    with atomic_file(out.with_name(f"{out.name}.png")) as temporary:
        picture.save(temporary, format="PNG")
    with atomic_file(out.with_name(f"{out.name}.json")) as temporary:
        Path(temporary).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


HEADINGS = ("method", "calls", "all", "object", "relation", "background", "all, held out", "FD (judge)", "unbiased")


def table_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """The record as rows of text, shares in per cent."""
    shares = ("all", "object", "relation", "background")
    return [
        (
            row["method"], str(row["network_calls"]), *(f"{100 * row['seen'][name]:.1f}" for name in shares),
            f"{100 * row['held_out']['all']:.1f}", f"{row['fd_judge']:.1f}", f"{row['fd_judge_unbiased']:.1f}",
        )
        for row in record["rows"]
    ]  # fmt: skip


def as_markdown(record: dict[str, Any]) -> str:
    """The table that the README shows; a test holds the two equal."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table_rows(record)])


def as_rich(record: dict[str, Any]) -> Table:
    """The same table for a terminal."""
    table = Table(title=f"prompt fidelity in %, n = {record['n']['seen']} seen, {record['n']['held_out']} held out")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in table_rows(record):
        table.add_row(*row)
    return table
