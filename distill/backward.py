"""Backward distillation: the student's own trajectory from pure noise, and the teacher's target on it.

Kohler et al. 2024 (arXiv 2405.05224), section 3. x_t = alpha_t x0 + sigma_t eps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch

from ..core.plan import StepPlan
from ..core.sampler import DETERMINISTIC, Sampler
from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable, sample, update_table
from ..pipelines.networks import Conditions
from .models import Denoiser, Step


@torch.no_grad()
def rollout(
    denoiser: Step, x_T: torch.Tensor, table: UpdateTable, steps: int, *, noises: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """x_{T->t} = stopgrad(f_Theta(... f_Theta(x_T))): the state after the first `steps` steps of the student's plan.

    noises: fresh noise of each step, for a table that re-noises.
    """
    return sample(denoiser, x_T, table, steps=steps, noises=noises)


def shifted_time(t: int, gamma: float) -> int:
    """gamma(t) = gamma t, rounded: high for high t (structure), low for low t (detail)."""
    return round(gamma * t)


def teacher_plan(t: int, k: int) -> StepPlan:
    """k evenly spaced times from t down, the last of which steps to the clean estimate (fewer where t < k)."""
    return StepPlan(tuple(sorted({round(t * (k - i) / k) for i in range(k)}, reverse=True)))


@lru_cache(1024)
def _table(
    schedule: NoiseSchedule, timesteps: tuple[float, ...], prediction_type: str, correction: bool, sampler: Sampler
) -> UpdateTable:
    return update_table(schedule, StepPlan(timesteps), prediction_type, noise_correction=correction, sampler=sampler)


def table_of(
    denoiser: Denoiser, timesteps: Iterable[float], *, noise_correction: bool = False, sampler: Sampler = DETERMINISTIC
) -> UpdateTable:
    """The update table of a plan on the denoiser's schedule."""
    how: Any = sampler  # frozen, so hashable
    return _table(denoiser.schedule, tuple(timesteps), denoiser.prediction_type, noise_correction, how)


Solver = Literal["ddim", "dpm_solver++"]


@torch.no_grad()
def teacher_target(
    teacher: Denoiser,
    x: torch.Tensor,
    t: int,
    k: int,
    text: Conditions,
    uncond: Conditions,
    guidance: torch.Tensor | float,
    *,
    solver: Solver = "ddim",
) -> torch.Tensor:
    """x0hat(f_Phi^k(x), eps_Phi, .): k guided deterministic steps of the frozen teacher down to its clean estimate.

    x (B, C, h, w) at time t; text, uncond (B, ...) each; guidance (B,). Returns x0 (B, C, h, w) without gradient.
    """
    return solved(teacher, teacher.guided(text, uncond, guidance), x, teacher_plan(t, k).timesteps, solver)


@torch.no_grad()
def solved(denoiser: Denoiser, step: Step, x: torch.Tensor, times: Sequence[float], solver: Solver) -> torch.Tensor:
    """The clean estimate at the last of `times`, reached by a deterministic solver from x (B, C, h, w) at the first."""
    if solver == "dpm_solver++":
        return dpm_solver(denoiser, step, x, times)
    table = table_of(denoiser, times)
    return rollout(step, x, table, len(table))


def dpm_solver(denoiser: Denoiser, step: Step, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    """The clean estimate at the last of `times`, reached from x (B, C, h, w) at the first by DPM-Solver++(2M).

    Lu et al. 2022 (arXiv 2211.01095, algorithm 2): with lambda = log(alpha / sigma) and h its growth in a step,
    x' = sigma' / sigma x - alpha' (exp(-h) - 1) (x0 + h / (2 h_before) (x0 - x0_before)); the first step is of first order.
    """
    before, grown = None, math.inf
    for now, after in itertools.pairwise(times):
        x0, _ = denoiser.estimates(x, step(x, now), now)
        (alpha, sigma), (alpha_after, sigma_after) = (denoiser.scales(time, x) for time in (now, after))
        h = _log_ratio(alpha_after, sigma_after) - _log_ratio(alpha, sigma)
        estimate = x0
        if before is not None and math.isfinite(h) and math.isfinite(grown):  # not where alpha or sigma is 0
            estimate = x0 + h / (2 * grown) * (x0 - before)
        x = sigma_after / sigma * x - alpha_after * math.expm1(-h) * estimate
        before, grown = x0, h
    return denoiser.estimates(x, step(x, times[-1]), times[-1])[0]


def _log_ratio(alpha: float, sigma: float) -> float:
    return math.inf if sigma == 0 else math.log(alpha / sigma) if alpha else -math.inf


def choose_noise(kind: str, own: torch.Tensor, fresh: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """The noise of chi, which the paper leaves open: the student's own eps, a fresh draw, or x_T."""
    choices: dict[str, Any] = {"own": own, "fresh": fresh, "initial": initial}
    return choices[kind]
