"""`distill`: a student of a few steps from a teacher folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..core.errors import ArtifactError, RecipeError
from ..core.schedule import NoiseSchedule
from ..folders.files import STUDENT_FILE, hash_folder, refuse_foreign
from ..folders.manifests import StudentManifest
from ..pipelines.loading import student_folder
from .data.captioned import PictureSource
from .data.emoji import find_font
from .data.latents import encoded_scenes
from .data.pictures import PictureSet, picture_set
from .data.prompts import emoji_prompts
from .data.vocabulary import all_words, vocabulary
from .fit import fit
from .methods import method_named
from .models import Model, load_model, load_teacher
from .optimizers import check_optimizer
from .processes import check_split, processes
from .recipe import DistillRecipe
from .report import check_trackers
from .saving import save_lora, save_pipeline
from .sharding import check_sharding
from .task import DistillTask
from .teacher import PREVIEW_PROMPTS


def distill(
    teacher_folder: Path,
    out: Path,
    recipe: DistillRecipe,
    *,
    prompts: list[str] | None = None,
    pictures: PictureSource | None = None,
    start: Path | None = None,
    start_teacher: Path | None = None,
    font: Path | None = None,
    scenes: Path | None = None,
    console: Console | None = None,
    track: Sequence[str] = (),
    shared: bool = False,
) -> StudentManifest:
    """Distil `teacher_folder` into the student folder `out`; the run's state is kept beside it in `{out}.run`.

    prompts: instead of captions of emoji scenes; pictures: of one's own, whose captions are the prompts. start: a student
    folder whose weights it begins with, instead of the teacher's; start_teacher: its teacher, an earlier state of this one:
    what the teacher learned since is added to the student. scenes: a folder in which several trainings keep the latents of rendered
    scenes; by default that of the run. track: trackers by accelerate's names, tensorboard for one.
    shared: each of several processes keeps a part of the student. Called again after a kill, it goes on where the last
    checkpoint was. Errors: ArtifactError for a folder that is no pipeline, RecipeError for a plan outside the teacher's schedule.
    """
    console, out = console or Console(stderr=True), out.resolve()
    if out == teacher_folder.resolve():
        raise ArtifactError(f"{out} is the teacher itself; write the student elsewhere")
    refuse_foreign(out, (STUDENT_FILE,))
    begins: Any = {"start": start, "start_teacher": start_teacher}
    check_run(recipe, prompts, pictures, **begins, font=font, track=track, shared=shared)
    folder = student_folder(teacher_folder)
    teacher, teacher_sha256 = load_teacher(folder, recipe).to(processes().device), hash_folder(folder)
    begun = _begun(start, start_teacher, teacher) if start else None
    run = out.with_name(out.name + ".run")
    if pictures is not None and pictures.buckets:
        teacher = teacher.of_any_size()
    latents, digest = _scenes(recipe, teacher, scenes or run, font, console) if pictures is None else [], ""
    if pictures is not None:
        own = _own_pictures(recipe, teacher, run, pictures, console)
        prompts, latents, digest = own.captions, own.latents, own.digest
    with processes().main_process_first():
        task = DistillTask(
            recipe,
            teacher,
            prompts or emoji_prompts(recipe.prompts, recipe.seed, recipe.stated_patterns),
            teacher_sha256,
            pictures=latents,
            pictures_sha256=digest,
            start=begun,
            shown=() if prompts else PREVIEW_PROMPTS,
            text_file=run / "text.safetensors" if recipe.cache_text else None,
        )
    figures = fit(task, recipe.fit, run, console, track=track, shared=shared)
    if processes().is_main_process:
        console.print(f"student: {figures}")
    manifest = _described(recipe, figures, teacher_sha256, emoji=not prompts)
    if recipe.lora is not None:
        manifest = manifest.model_copy(update={"base": _base(teacher_folder, folder)})
    _save(task, out, manifest, folder)
    return manifest


def _described(
    recipe: DistillRecipe, figures: dict[str, float], teacher_sha256: str, *, emoji: bool
) -> StudentManifest:
    """emoji: it was trained on the captions of emoji scenes, so their words are all that it knows."""
    return StudentManifest(
        plans={steps: list(timesteps) for steps, timesteps in recipe.plans.items()},
        noise_correction=recipe.noise_correction,
        sampler=method_named(recipe.method).sampler,
        recipe=recipe.model_dump(mode="json"),
        teacher_sha256=teacher_sha256,
        training=figures,
        known_words=all_words() if emoji else [],
        vocabulary=vocabulary() if emoji else {},
    )


def _begun(start: Path, start_teacher: Path | None, teacher: Model) -> tuple[torch.nn.Module, str]:
    """The network that training begins with, on the CPU, and a hash of what it is made of; nothing else of its pipeline stays.
    ArtifactError where it, or its teacher, is no network like this teacher's."""
    student = _network_like(start, teacher)
    if start_teacher is None:
        return student, hash_folder(start)
    add_learned(student, _network_like(start_teacher, teacher), teacher.network)
    return student, hash_folder(start) + hash_folder(start_teacher)


def _network_like(folder: Path, teacher: Model) -> torch.nn.Module:
    """The network of a folder. ArtifactError where what it says, the noise at its times, or its shapes are not the teacher's;
    sampler and plans may be others."""
    found = load_model(folder)
    ours, theirs = found.denoiser, teacher.denoiser
    if ours.prediction_type != theirs.prediction_type:
        what = f"predicts {ours.prediction_type}, and the teacher {theirs.prediction_type}"
    elif not _same_noise(ours.schedule, theirs.schedule):
        what = "was trained on another noise schedule than the teacher"
    elif different := _other_shapes(found.network, teacher.network):
        what = f"has another network than the teacher, {different}"
    else:
        return found.network
    raise ArtifactError(f"{folder} {what}; begin with a student of a teacher like this one, or without --start")


def _same_noise(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    """Whether networks of both are told the same at the same noise: of a flow that is the noise itself, at whatever time."""
    if (one.kind, one.num_train_timesteps) != (other.kind, other.num_train_timesteps):
        return False
    return one.kind == "flow" or np.allclose(one.alpha, other.alpha, rtol=0, atol=1e-6)


def _other_shapes(one: torch.nn.Module, other: torch.nn.Module) -> str:
    """The first weight whose shapes differ, with both; nothing where all are alike."""
    ours, theirs = ({name: tuple(value.shape) for name, value in net.state_dict().items()} for net in (one, other))
    names = (name for name in theirs | ours if ours.get(name) != theirs.get(name))
    return next((f"{name} of {ours.get(name, 'no shape')} and {theirs.get(name, 'no shape')}" for name in names), "")


@torch.no_grad()
def add_learned(student: torch.nn.Module, before: torch.nn.Module, after: torch.nn.Module) -> None:
    """Add to the student's weights what its teacher learned between two states (Ilharco et al. 2022, arXiv 2212.04089, eq. 1).
    ArtifactError where the networks differ."""
    states: list[dict[str, torch.Tensor]] = [network.state_dict() for network in (student, before, after)]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ArtifactError(
            "student, its teacher and the teacher of this run must have one network to add what was learned"
        )
    for name, value in states[0].items():
        value += (states[2][name].to(value.device) - states[1][name].to(value.device)).to(value.dtype)


def check_run(
    recipe: DistillRecipe,
    prompts: list[str] | None = None,
    pictures: PictureSource | None = None,
    *,
    start: Path | None = None,
    start_teacher: Path | None = None,
    font: Path | None = None,
    track: Sequence[str] = (),
    shared: bool = False,
) -> None:
    """Raises what `distill` would, of these, before it reads any model or picture."""
    check_trackers(track)
    _check_data(recipe, prompts, pictures)
    _check_recipe(recipe, start, start_teacher, shared)
    if pictures is not None:
        pictures.check()
    if font is not None:
        find_font(font)
    for folder in filter(None, (start, start_teacher)):
        if not student_folder(folder).is_dir():
            raise ArtifactError(f"there is no folder {folder} to begin with; give a student's, and its teacher's")


def _check_recipe(recipe: DistillRecipe, start: Path | None, start_teacher: Path | None, shared: bool) -> None:
    """Raises an error for what this run cannot do: RecipeError, MissingExtraError, and for how it was launched."""
    check_optimizer(recipe.fit)
    check_split(recipe.fit)
    launched = processes().num_processes
    if shared:
        check_sharding(recipe.fit, launched)
    if start_teacher is not None and start is None:
        raise RecipeError("what the teacher learned is added to a student; give that by --start too")
    if recipe.lora is not None and start is not None:
        raise RecipeError("'lora' begins with the teacher; leave out --start, or take a recipe without 'lora'")


def _check_data(recipe: DistillRecipe, prompts: list[str] | None, pictures: PictureSource | None) -> None:
    """Raises RecipeError where recipe and data do not belong together."""
    needed = method_named(recipe.method).pictures(recipe)
    if pictures is not None and prompts:
        raise RecipeError("the captions of the pictures are the prompts; leave out --prompts or --pictures")
    if needed and prompts:
        raise RecipeError(
            "this recipe needs pictures, which prompts alone have not; give --pictures, leave out 'adversarial' and "
            "'backward_distillation', or take another method"
        )
    if pictures is not None and not needed:
        raise RecipeError(
            "this recipe needs no pictures, so none would be looked at; give the captions by --prompts FILE, or take "
            "'adversarial' or another method"
        )


def _scenes(
    recipe: DistillRecipe, teacher: Model, folder: Path, font: Path | None, console: Console
) -> list[torch.Tensor]:
    """Latents of the scenes that the captions describe, for a method that asks for pictures; kept in the folder."""
    if not method_named(recipe.method).pictures(recipe):
        return []
    path = folder / f"latents-{recipe.seed}-{recipe.prompts}.safetensors"
    what: Any = {"seed": recipe.seed, "size": teacher.stages.default_size[0], "count": recipe.prompts}
    with processes().main_process_first():
        return [encoded_scenes(teacher, path, **what, font=font, console=console)]


def _own_pictures(
    recipe: DistillRecipe, teacher: Model, run: Path, source: PictureSource, console: Console
) -> PictureSet:
    """The pictures of a source as latents, kept in the run's folder. RecipeError where they are too few."""
    with processes().main_process_first():
        found = picture_set(teacher, source, run / "pictures.safetensors", most=recipe.prompts, console=console)
    if len(found.captions) < recipe.fit.batch:
        raise RecipeError(
            f"{source.place} has {len(found.captions)} pictures of use, fewer than fit.batch {recipe.fit.batch}; "
            "give more, or lower the batch"
        )
    return found


def _base(teacher: Path, folder: Path) -> str:
    """Where a LoRA's base is found again: a folder by its whole path, or the hub id as it was given."""
    return str(folder.resolve() if Path(teacher).exists() else teacher)


def _save(task: DistillTask, out: Path, manifest: StudentManifest, teacher: Path) -> None:
    """Write the student's folder: its adapters, or its whole pipeline with the plans in the scheduler's config."""
    extra = {STUDENT_FILE: manifest.model_dump_json(indent=2)}
    if task.recipe.lora is not None:
        save_lora(task.student, out, extra=extra, replaces=(STUDENT_FILE,))
        return
    plans = {str(steps): times for steps, times in manifest.plans.items()}
    how: Any = {"scheduler": {"plans": plans, "noise_correction": manifest.noise_correction}}
    how |= {"stored": teacher if task.recipe.teacher_dtype == "bfloat16" else None}
    save_pipeline(task.student, out, extra=extra, replaces=(STUDENT_FILE,), sampler=manifest.sampler, **how)
