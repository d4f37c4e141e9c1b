"""Backward distillation: the student's own trajectory from pure noise, and the teacher's target on it.

Kohler et al. 2024 (arXiv 2405.05224), section 3. x_t = alpha_t x0 + sigma_t eps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.plan import StepPlan
from ..core.update import UpdateTable, sample, update_table
from .networks import Networks

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]


@torch.no_grad()
def rollout(denoiser: Denoiser, x_T: torch.Tensor, table: UpdateTable, steps: int) -> torch.Tensor:
    """x_{T->t} = stopgrad(f_Theta(... f_Theta(x_T))): the state after the first `steps` steps of the student's plan."""
    return sample(lambda x, t: denoiser(x, int(t)).float(), x_T, table, steps=steps)


def shifted_time(t: int, gamma: float) -> int:
    """gamma(t) = gamma t, rounded: high for high t (structure), low for low t (detail)."""
    return round(gamma * t)


def teacher_plan(t: int, k: int) -> StepPlan:
    """k evenly spaced times from t down, the last of which steps to the clean estimate (fewer where t < k)."""
    return StepPlan(tuple(sorted({round(t * (k - i) / k) for i in range(k)}, reverse=True)))


class TeacherTarget:
    """x0hat(f_Phi^k(x), eps_Phi, .): k guided deterministic steps of the frozen teacher down to its clean estimate."""

    def __init__(self, teacher: Networks, k: int) -> None:
        self.teacher, self.k = teacher, k
        self._tables: dict[int, UpdateTable] = {}

    def table(self, t: int) -> UpdateTable:
        if t not in self._tables:
            teacher, plan = self.teacher, teacher_plan(t, self.k)
            self._tables[t] = update_table(teacher.schedule, plan, teacher.prediction_type, noise_correction=False)
        return self._tables[t]

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, t: int, text: torch.Tensor, uncond: torch.Tensor, guidance: torch.Tensor
    ) -> torch.Tensor:
        """x (B, C, h, w) at time t; text, uncond (B, L, D); guidance (B,). Returns x0 (B, C, h, w) without gradient."""
        both = torch.cat([uncond, text])
        w = guidance.view(-1, 1, 1, 1)

        def guided(x_t: torch.Tensor, time: int) -> torch.Tensor:
            m_u, m_c = self.teacher.predict(torch.cat([x_t, x_t]), time, both).float().chunk(2)
            return m_u + w * (m_c - m_u)

        table = self.table(t)
        return rollout(guided, x, table, len(table.timesteps))


def renoised(x0: torch.Tensor, noise: torch.Tensor, t: int, networks: Networks) -> torch.Tensor:
    """chi = alpha_t stopgrad(x0) + sigma_t noise (shifted reconstruction loss), where t is the shifted time."""
    alpha_t, sigma_t = networks.schedule.at(t)
    return float(alpha_t) * x0.detach() + float(sigma_t) * noise.detach()


def choose_noise(kind: str, own: torch.Tensor, fresh: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """The noise of chi, which the paper leaves open: the student's own eps, a fresh draw, or x_T."""
    choices: dict[str, Any] = {"own": own, "fresh": fresh, "initial": initial}
    return choices[kind]
