"""The rows of the quality table: what draws the pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.plan import StepPlan
from ...core.update import UpdateTable, update_table
from ...distill.data.emoji import EmojiScenes
from ...distill.data.rendering import to_signed
from ...distill.grids import to_pixels
from ...distill.networks import Networks, noise_of
from .prompts import SPLITS, Prompts

Latents = torch.Tensor | None
FOUR_STEPS = (999, 749, 499, 249)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: how it draws the pictures of prompts, (N, H, W, 3) uint8, and their latents (None: it has none)."""

    name: str
    network_calls: int
    draw: Callable[[Prompts], tuple[np.ndarray, Latents]]
    shown: bool = False  # in the grid of pictures


def rendered_scenes(font: Path | None = None) -> Method:
    """The scenes that the captions were written for."""
    return Method(name="rendered scenes", network_calls=0, draw=lambda p: (_scenes(p, font), None), shown=True)


def reconstructions(networks: Networks, font: Path | None = None) -> Method:
    """The same scenes through the autoencoder: the best that any latent model of it could do."""

    @torch.no_grad()
    def draw(prompts: Prompts) -> tuple[np.ndarray, Latents]:
        encoded = networks.vae.encode(to_signed(_scenes(prompts, font)))
        found = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        latents = found * networks.vae.config.scaling_factor
        return to_pixels(networks.decode(latents)), latents

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


def deterministic(
    name: str, networks: Networks, table: UpdateTable, *, guidance: float | None = None, shown: bool = False
) -> Method:
    """The project's own sampler; with guidance every step calls the network twice."""

    @torch.no_grad()
    def draw(prompts: Prompts) -> tuple[np.ndarray, Latents]:
        text = networks.embed(prompts.texts)
        uncond = networks.embed([""]) if guidance is not None else None
        noise = noise_of(prompts.seeds, networks.latent_shape)
        latents = networks.sample(noise, text, table, uncond=uncond, guidance=guidance or 1.0)
        return to_pixels(networks.decode(latents)), latents

    return Method(name=name, network_calls=len(table) * (1 if guidance is None else 2), draw=draw, shown=shown)


def teacher_row(teacher: Networks, steps: int, guidance: float, *, shown: bool = False) -> Method:
    """The teacher with guidance and DDIM's steps at trailing times."""
    plan = StepPlan.trailing(steps, teacher.schedule.num_train_timesteps)
    table = update_table(teacher.schedule, plan, teacher.prediction_type, noise_correction=False)
    name = f"teacher, {steps} step{'s' if steps > 1 else ''}"
    return deterministic(name, teacher, table, guidance=guidance, shown=shown)


def student_row(student: Networks, plan: StepPlan, *, corrected: bool, shown: bool = False) -> Method:
    """A plan of the student, with or without noise correction."""
    table = update_table(student.schedule, plan, student.prediction_type, noise_correction=corrected)
    steps = len(plan)
    name = f"student, {steps} step{'s' if steps > 1 else ''}{'' if corrected else ', no noise correction'}"
    return deterministic(name, student, table, shown=shown)


def solver_row(teacher: Networks, solver: str, steps: int, guidance: float) -> Method:
    """The teacher with a faster solver of diffusers: "DPM-Solver++" or "UniPC", second order, trailing times."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    classes: dict[str, Any] = {"DPM-Solver++": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}

    @torch.no_grad()
    def draw(prompts: Prompts) -> tuple[np.ndarray, Latents]:
        scheduler = classes[solver].from_config(teacher.scheduler_config, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        text = teacher.embed(prompts.texts)
        both = torch.cat([teacher.embed([""]).expand_as(text), text])
        x = noise_of(prompts.seeds, teacher.latent_shape) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            m_u, m_c = teacher.predict(torch.cat([x, x]), int(t), both).chunk(2)
            x = scheduler.step(m_u + guidance * (m_c - m_u), t, x).prev_sample
        return to_pixels(teacher.decode(x)), x

    return Method(name=f"teacher, {steps} steps, {solver}", network_calls=2 * steps, draw=draw)


def table_of_methods(
    teacher: Networks, student: Networks | None, plans: dict[int, StepPlan], guidance: float, font: Path | None = None
) -> list[Method]:
    """Every row of the table, the reference of all comparisons ("teacher, 25 steps") before what is compared with it."""
    rows = [rendered_scenes(font), reconstructions(teacher, font)]
    rows += [teacher_row(teacher, steps, guidance, shown=steps in (25, 3)) for steps in (25, 12, 6, 3)]
    rows += [solver_row(teacher, solver, steps, guidance) for solver in ("DPM-Solver++", "UniPC") for steps in (8, 4)]
    if student is not None:
        plans = {4: StepPlan(FOUR_STEPS), **plans} if student.schedule.num_train_timesteps == 1000 else plans
        for corrected in (True, False):
            for steps, plan in sorted(plans.items(), reverse=True):
                if corrected or steps > 1:  # a plan of one step has no correction
                    rows.append(student_row(student, plan, corrected=corrected, shown=corrected and steps < 4))
    return rows
