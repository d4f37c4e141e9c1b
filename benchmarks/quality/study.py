"""`study`: recipes that differ in a few fields, trained from one teacher and measured on the same prompts and noises.

The table of a study is what the default recipe rests on, and the comparison of methods is a study too: every variant has the
same teacher, starts from it, and is measured beside it with paired intervals. Variants have equal updates, or an equal
`budget`: methods differ in what an update costs. Each finished variant is kept: a study that was stopped goes on with the
next one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console

from ...core.errors import RecipeError, nearest
from ...distill.methods import distill_recipe
from ...distill.models import Model, load_model
from ...distill.recipe import DistillRecipe, Frozen, merged, parse_recipe, read_recipe, read_with_base
from ...distill.reproducible import fingerprint
from ...distill.student import distill
from ...folders.files import hash_folder, sha256_file
from ...folders.manifests import StudentManifest
from ...folders.reading import read_student_manifest
from .comparison import comparison_grid, save_quality
from .cost import updates_within
from .evaluate import Kinds, compare, measured
from .judge import FEWEST, load_judge
from .measure import PictureStore
from .method import Method
from .methods import reconstructions, rendered_scenes, solver_row, student_row, teacher_row
from .paired import Distance, between
from .prompts import draw_prompts
from .tables import as_rich


class Study(Frozen):
    """What is varied. `common` and then each variant's own fields replace those of the recipe `base`."""

    question: str
    base: str = "imagine_flash"
    common: dict[str, Any] = Field(default_factory=dict)
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    budget: Annotated[float, Field(gt=0)] | None = None  # evaluations of the network, which replace each `fit.steps`
    teacher_steps: tuple[Annotated[int, Field(gt=0)], ...] = (3,)  # rows of the teacher beside the one of 25 steps
    solvers: tuple[
        Literal["DPM-Solver++", "UniPC"], ...
    ] = ()  # by which the teacher takes as many steps, in further rows
    guidance: float = 3.0  # of the teacher's rows
    split: Literal["validation", "test"] = "validation"
    count: Annotated[int, Field(ge=FEWEST)] = 2048
    held_out: Annotated[int, Field(ge=1)] = 256
    pairs: Literal["first", "every", "same_base"] = "first"  # what a variant is compared with: of those before it

    def compared_with(self, name: str) -> list[str]:
        """The variants before this one that it is put beside."""
        before = list(self.variants)[: list(self.variants).index(name)]
        if self.pairs == "same_base":
            bases = {one: fields.get("base", self.base) for one, fields in self.variants.items()}
            return [one for one in before if bases[one] == bases[name]]
        return before if self.pairs == "every" else before[:1]


def load_study(path: Path) -> tuple[Study, dict[str, DistillRecipe]]:
    """A study and the recipe of each variant; RecipeError for anything wrong, before the first hour of training."""
    if not path.is_file():
        raise RecipeError(f"no study at {path}; give a YAML file such as those in benchmarks/studies")
    values, source = read_recipe(path)
    study = parse_recipe(values, Study, source)
    recipes = {}
    for name, fields in study.variants.items():
        base, _ = read_with_base(fields.get("base", study.base))
        own = {key: value for key, value in fields.items() if key != "base"}
        recipes[name] = distill_recipe(merged(merged(base, study.common), own), f"{path}, variant {name!r}")
    slugs = {slug(name) for name in recipes}
    if len(slugs) < len(recipes):
        raise RecipeError(f"{path}: names of variants must differ in letters and digits, got {', '.join(recipes)}")
    return study, recipes


def slug(name: str) -> str:
    """A file name of a variant's name."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())


def train_variant(
    path: Path, name: str, teacher_folder: Path, out: Path, *, font: Path | None = None, console: Console | None = None
) -> StudentManifest:
    """Train one variant into `out`.run and measure nothing, so that several can train at once, each in a process or on a device
    of its own; `run_study` goes on with what is there. RecipeError as there, and for a name that is no variant's."""
    study, recipes = load_study(path)
    if name not in recipes:
        raise RecipeError(f"{path}: no variant {name!r}; there are {', '.join(recipes)}{nearest(name, list(recipes))}")
    recipe, folder = recipes[name], out.with_name(f"{out.name}.run") / slug(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if study.budget is not None:
        recipe = updates_within(study.budget, recipe, load_model(teacher_folder))
    return _student_of(recipe, teacher_folder, folder, font, console or Console(stderr=True))


def run_study(
    path: Path,
    teacher_folder: Path,
    judge_file: Path,
    out: Path,
    *,
    font: Path | None = None,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train and measure every variant; write `out`.json and `out`.png after each of them and return the record.

    device: what draws and judges; trainings take accelerate's. console: of progress and of what is known so far, by default
    standard error. Students and pictures are kept in `out`.run, and the latents of
    rendered scenes, once for all variants. Errors: RecipeError for a study or variant that is not valid, ArtifactError for a folder
    that is no teacher or a run of another study.
    """
    study, recipes = load_study(path)
    judge, accuracy = load_judge(judge_file)
    teacher, judge = load_model(teacher_folder).to(device), judge.to(device)
    console, run = console or Console(stderr=True), out.with_name(f"{out.name}.run")
    hashes = {"teacher": hash_folder(teacher_folder), "judge": sha256_file(judge_file)}
    seen = draw_prompts(study.count, split=study.split, held_out=False)
    unseen = draw_prompts(study.held_out, split=study.split, held_out=True)

    def pictures_of(methods: list[Method], folder: str, *parts: Any) -> dict[str, Kinds]:
        store = PictureStore(run / folder, fingerprint(hashes, study.split, study.guidance, *parts))
        return measured(methods, seen, unseen, judge, store, console)

    methods = [rendered_scenes(font), reconstructions(teacher, font)]
    numbers = dict.fromkeys((25, *study.teacher_steps))
    methods += [teacher_row(teacher, steps, study.guidance, shown=True) for steps in numbers]
    methods += [solver_row(teacher, s, steps, study.guidance) for s in study.solvers for steps in study.teacher_steps]
    found, shown = pictures_of(methods, "references"), [method for method in methods if method.shown]
    record: dict[str, Any] = {"question": study.question, "schema": 2, "split": study.split, "sha256": hashes}
    record |= {"n": {"seen": study.count, "held_out": study.held_out}, "guidance": study.guidance}
    record |= {
        "judge_accuracy": accuracy,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "budget": study.budget,
        "variants": {},
    }
    distances: dict[str, Distance] = {}
    record |= {"rows": compare(methods, found, judge, distances), "pairs": []}
    drawn: dict[str, list[Method]] = {}  # the rows of each variant
    for name, recipe in recipes.items():
        if study.budget is not None:
            recipe = updates_within(study.budget, recipe, teacher)
        manifest = _student_of(recipe, teacher_folder, run / slug(name), font, console)
        student = load_model(run / slug(name)).to(device)
        rows = student_rows(name, student, manifest)
        found |= pictures_of(rows, f"{slug(name)}.pictures", hash_folder(run / slug(name)))
        record["variants"][name] = {"fields": study.variants[name], "training": manifest.training}
        record["rows"] += compare(rows, found, judge, distances)
        drawn[name], shown = rows, shown + rows
        for other in study.compared_with(name):
            record["pairs"] += pairs(drawn[other], rows, found, distances)
        save_quality(record, comparison_grid(shown, scale=1, label=250, emoji_font=font), out)
        console.print(as_rich(record))
    return record


def pairs(
    one: list[Method], other: list[Method], found: dict[str, Kinds], distances: dict[str, Distance]
) -> list[dict[str, Any]]:
    """Two variants where both draw in as many steps: from the same prompts and noises."""
    same = ((a.name, b.name) for a in one for b in other if a.network_calls == b.network_calls)
    return [
        {"method": a, "than": b} | between(found[a]["seen"], found[b]["seen"], distances[a], distances[b])
        for a, b in same
    ]


def _student_of(
    recipe: DistillRecipe, teacher: Path, folder: Path, font: Path | None, console: Console
) -> StudentManifest:
    """The manifest of the student in `folder`, which is trained if it is not there yet."""
    if not folder.exists():
        distill(teacher, folder, recipe, font=font, console=console, scenes=folder.parent)
    manifest = read_student_manifest(folder)
    if distill_recipe(manifest.recipe, str(folder)) != recipe:  # parsed, since keys that came later have defaults
        raise RecipeError(f"{folder} was trained by another recipe; choose another OUTPUT, or delete that folder")
    if manifest.teacher_sha256 != hash_folder(teacher):
        raise RecipeError(f"{folder} has another teacher than {teacher}; choose another OUTPUT, or delete that folder")
    return manifest


def student_rows(variant: str, student: Model, manifest: StudentManifest) -> list[Method]:
    """A row for each plan that the variant was trained for, drawn as its manifest says."""
    rows = [
        student_row(student, plan, manifest.sampler, corrected=manifest.noise_correction, shown=True)
        for _, plan in sorted(manifest.step_plans.items(), reverse=True)
    ]
    return [replace(row, name=f"{variant}: {row.name.partition(', no')[0]}") for row in rows]
