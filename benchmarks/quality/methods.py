"""The rows of the quality table: what draws the pictures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.plan import StepPlan
from ...core.sampler import Sampler
from ...core.update import UpdateTable, update_table
from ...distill.data.emoji import EmojiScenes
from ...distill.models import Model, noise_of, noises_of
from .method import Latents, Method
from .prompts import SPLITS, Prompts

FOUR_STEPS = (999, 749, 499, 249)


def rendered_scenes(font: Path | None = None) -> Method:
    """The scenes that the captions were written for."""
    return Method(name="rendered scenes", network_calls=0, draw=lambda p: (_scenes(p, font), None), shown=True)


def reconstructions(model: Model, font: Path | None = None) -> Method:
    """The same scenes through the autoencoder: the best that any latent model of it could do."""

    @torch.no_grad()
    def draw(prompts: Prompts) -> tuple[np.ndarray, Latents]:
        latents = model.stages.image_encoder(torch.from_numpy(_scenes(prompts, font)).to(model.device))
        return model.decode(latents), latents

    return Method(name="autoencoder", network_calls=0, draw=draw)


def _scenes(prompts: Prompts, font: Path | None) -> np.ndarray:
    """The scenes as they stand in the stream of their split; those of no split are drawn by their index alone."""
    scenes = _stream(prompts.split, prompts.held_out, font)
    if prompts.split:
        return np.stack([scenes[i].image for i in prompts.index])
    pairs = zip(prompts.scenes, prompts.index, strict=True)
    return np.stack([scenes.renderer.render(scene, np.random.default_rng(i)) for scene, i in pairs])


@functools.lru_cache(4)
def _stream(split: str, held_out: bool, font: Path | None) -> EmojiScenes:
    return EmojiScenes(seed=SPLITS.get(split, 0), held_out=held_out, font=font)


def sampled(
    name: str, model: Model, table: UpdateTable, *, guidance: float | None = None, shown: bool = False
) -> Method:
    """The project's own sampler; with guidance every step calls the network twice."""

    def draw(prompts: Prompts) -> tuple[np.ndarray, Latents]:
        text = model.embed(prompts.texts)
        uncond = model.embed_negative() if guidance is not None else None
        noise = noise_of(prompts.seeds, model.latent_shape).to(model.device)
        fresh = [each.to(model.device) for each in noises_of(prompts.seeds, model.latent_shape, table)]
        latents = model.sample(noise, text, table, uncond=uncond, guidance=guidance or 1.0, noises=fresh)
        return model.decode(latents), latents

    return Method(name=name, network_calls=len(table) * (1 if guidance is None else 2), draw=draw, shown=shown)


def teacher_row(teacher: Model, steps: int, guidance: float, *, shown: bool = False) -> Method:
    """The teacher with guidance and DDIM's steps at trailing times."""
    denoiser = teacher.denoiser
    plan = StepPlan.trailing(steps, denoiser.schedule.num_train_timesteps)
    table = update_table(denoiser.schedule, plan, denoiser.prediction_type, noise_correction=False)
    name = f"teacher, {steps} step{'s' if steps > 1 else ''}"
    return sampled(name, teacher, table, guidance=guidance, shown=shown)


def student_row(student: Model, plan: StepPlan, sampler: Sampler, *, corrected: bool, shown: bool = False) -> Method:
    """A plan of the student by the sampler that it was distilled for, with or without noise correction."""
    denoiser = student.denoiser
    table = update_table(denoiser.schedule, plan, denoiser.prediction_type, noise_correction=corrected, sampler=sampler)
    steps = len(plan)
    name = f"student, {steps} step{'s' if steps > 1 else ''}{'' if corrected else ', no noise correction'}"
    return sampled(name, student, table, shown=shown)


def solver_row(teacher: Model, solver: str, steps: int, guidance: float) -> Method:
    """The teacher with a faster solver of diffusers: "DPM-Solver++" or "UniPC", second order, trailing times."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    classes: dict[str, Any] = {"DPM-Solver++": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}

    @torch.no_grad()
    def draw(prompts: Prompts) -> tuple[np.ndarray, Latents]:
        scheduler = classes[solver].from_config(teacher.stages.scheduler, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        step = teacher.denoiser.guided(teacher.embed(prompts.texts), teacher.embed_negative(), guidance)
        x = noise_of(prompts.seeds, teacher.latent_shape).to(teacher.device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(step(x, int(t)), t, x).prev_sample
        return teacher.decode(x), x

    return Method(name=f"teacher, {steps} steps, {solver}", network_calls=2 * steps, draw=draw)


def teacher_table(teacher: Model, guidance: float, font: Path | None = None) -> list[Method]:
    """The rows that need no student, the reference of all comparisons ("teacher, 25 steps") before what is compared with it."""
    rows = [rendered_scenes(font), reconstructions(teacher, font)]
    rows += [teacher_row(teacher, steps, guidance, shown=steps in (25, 3)) for steps in (25, 12, 6, 3)]
    return rows + [
        solver_row(teacher, solver, steps, guidance) for solver in ("DPM-Solver++", "UniPC") for steps in (8, 4)
    ]


def student_table(student: Model, plans: dict[int, StepPlan], sampler: Sampler) -> list[Method]:
    """The student's rows, with a plan of four steps. Noise correction is a row of its own where steps are deterministic."""
    rows = []
    plans = {4: StepPlan(FOUR_STEPS), **plans} if student.denoiser.last_time == 999 else plans
    for corrected in (True, False) if sampler.kind == "deterministic" else (True,):
        for steps, plan in sorted(plans.items(), reverse=True):
            if corrected or steps > 1:  # a plan of one step has no correction
                shown = corrected and (steps < 4 or len(plans) == 1)
                rows.append(student_row(student, plan, sampler, corrected=corrected, shown=shown))
    return rows
