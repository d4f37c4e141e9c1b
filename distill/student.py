"""`distill`: a student of a few steps from a teacher folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..core.errors import ArtifactError, RecipeError
from ..folders.files import STUDENT_FILE, hash_folder, refuse_foreign
from ..folders.manifests import StudentManifest
from ..pipelines.loading import student_folder
from .data.latents import encoded_scenes
from .data.prompts import emoji_prompts
from .data.vocabulary import all_words, vocabulary
from .fit import fit
from .methods import method_named
from .models import load_model
from .processes import processes
from .recipe import DistillRecipe
from .saving import save_lora, save_pipeline
from .task import DistillTask
from .teacher import PREVIEW_PROMPTS


def distill(
    teacher_folder: Path,
    out: Path,
    recipe: DistillRecipe,
    *,
    prompts: list[str] | None = None,
    start: Path | None = None,
    font: Path | None = None,
    console: Console | None = None,
) -> StudentManifest:
    """Distil `teacher_folder` into the student folder `out`; the run's state is kept beside it in `{out}.run`.

    prompts: instead of captions of emoji scenes. start: a student folder whose weights it begins with, instead of the
    teacher's. Called again after a kill, it goes on where the last checkpoint was. Errors: ArtifactError for a folder that is not a
    pipeline, RecipeError for a plan outside the teacher's schedule.
    """
    console = console or Console(stderr=True)
    out = out.resolve()
    if out == teacher_folder.resolve():
        raise ArtifactError(f"{out} is the teacher itself; write the student elsewhere")
    refuse_foreign(out, (STUDENT_FILE,))
    folder = student_folder(teacher_folder)
    dtype: torch.dtype = getattr(torch, recipe.teacher_dtype)
    teacher, teacher_sha256 = load_model(folder, dtype), hash_folder(folder)
    if recipe.lora is not None and start is not None:
        raise RecipeError("'lora' begins with the teacher; leave out --start, or take a recipe without 'lora'")
    teacher.to(processes().device)
    last = teacher.denoiser.last_time
    for timesteps in recipe.plans.values():
        if timesteps[0] != last:
            raise RecipeError(f"plans must start at the teacher's last time {last}, got {list(timesteps)}")
    run, pictures = out.with_name(out.name + ".run"), None
    if method_named(recipe.method).pictures(recipe):
        if prompts:
            raise RecipeError(
                "this recipe needs pictures, which prompts alone have not; leave out 'adversarial', or take another method"
            )
        side = teacher.stages.default_size[0]
        with processes().main_process_first():
            pictures = encoded_scenes(
                teacher, run / "latents.safetensors", seed=recipe.seed, size=side, count=recipe.prompts, font=font
            )
    begun = (load_model(start).to(processes().device), hash_folder(start)) if start else None
    captions = prompts or emoji_prompts(recipe.prompts, recipe.seed)
    shown = () if prompts else PREVIEW_PROMPTS
    how: dict[str, Any] = {"pictures": pictures, "start": begun, "shown": shown}
    with processes().main_process_first():
        text_file = run / "text.safetensors" if recipe.cache_text else None
        task = DistillTask(recipe, teacher, captions, teacher_sha256, **how, text_file=text_file)
    figures = fit(task, recipe.fit, run, console)
    if processes().is_main_process:
        console.print(f"student: {figures}")
    sampler = method_named(recipe.method).sampler
    manifest = StudentManifest(
        plans={steps: list(timesteps) for steps, timesteps in recipe.plans.items()},
        noise_correction=recipe.noise_correction,
        sampler=sampler,
        recipe=recipe.model_dump(mode="json"),
        teacher_sha256=teacher_sha256,
        base=None
        if recipe.lora is None
        else str(folder.resolve() if Path(teacher_folder).exists() else teacher_folder),
        training=figures,
        known_words=[] if prompts else all_words(),
        vocabulary={} if prompts else vocabulary(),
    )
    extra = {STUDENT_FILE: manifest.model_dump_json(indent=2)}
    if recipe.lora is not None:
        save_lora(task.student, out, extra=extra, replaces=(STUDENT_FILE,))
        return manifest
    save_pipeline(
        task.student,
        out,
        extra=extra,
        replaces=(STUDENT_FILE,),
        sampler=sampler,
        scheduler={
            "plans": {str(n): list(times) for n, times in recipe.plans.items()},
            "noise_correction": recipe.noise_correction,
        },
    )
    return manifest
