"""Flash Diffusion (Chadebec et al. 2024, arXiv 2406.02347).

    z_i from data at the i-th of K teacher times (pure noise at i = 0);  y = the guided teacher's K - i steps from z_i
    L = mean( (f_Theta(z_i) - y)^2 ) + l_adv (sigmoid D(F(f_Theta noised)) - 1)^2 + l_dmd L_dmd
    gradient of L_dmd by f_Theta: (eps_Phi,w - eps_Theta) sigma_u / alpha_u / (mean |f_Theta - x0_Phi,w| + 1e-5)

i is drawn from four bumps at the times of a 4-step plan, whose weights and those of the terms move through four phases. With
`huber` the first term is the pseudo-Huber loss, where the authors' code has LPIPS. The discriminator reads the frozen teacher.
Drawn with by re-noising.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from ...core.plan import StepPlan
from ...pipelines.networks import Conditions
from ..backward import Solver, solved
from ..discriminator import NetworkFeatures, adversarial_gradient
from ..models import Denoiser
from ..recipe import DistillRecipe, Share
from ..weighting import distance
from .contract import Batch, Companion, Companions, Draws, Method
from .lcm import SAMPLER, consistency

Four = tuple[float, float, float, float]
BUMPS: tuple[Four, ...] = ((0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25, 0.25, 0.25, 0.25), (0.4, 0.2, 0.2, 0.2))
JUDGED_AT = (10, 250, 500, 750)  # of 1000 times


class FlashRecipe(DistillRecipe):
    draws_plans: ClassVar[bool] = False
    draws_by_length: ClassVar[bool] = True
    method: Literal["flash"] = "flash"
    plans: dict[int, tuple[int, ...]] = Field(default={1: (999,), 2: (999, 499), 4: (999, 749, 499, 249)}, min_length=1)
    teacher_steps: Annotated[int, Field(ge=4, multiple_of=4)] = 32  # K
    teacher_solver: Solver = "ddim"  # of these steps; the authors' code has dpm_solver++
    huber: Annotated[float, Field(gt=0)] | None = None  # d of the pseudo-Huber loss; None: the squared error
    adversarial_weights: Four = (0.0, 0.1, 0.2, 0.3)  # l_adv by phase; all 0: no discriminator
    matching_weights: Four = (0.0, 0.3, 0.5, 0.7)  # l_dmd by phase
    discriminator_rate: Annotated[float, Field(gt=0)] = 1e-5
    noise: tuple[Share, Share] = (0.0, 1.0)  # u / T

    def phase_at(self, step: int) -> int:
        """Which quarter of the training an update belongs to."""
        return min(3, 4 * step // self.fit.steps)

    def start_probabilities(self, phase: int) -> np.ndarray:
        """pi(i) ~ sum_m beta_m exp(-(i - m K / 4)^2 / 0.5), (K,)."""
        i = np.arange(self.teacher_steps)[:, None]
        bumps = np.exp(-((i - np.arange(4) * self.teacher_steps / 4) ** 2) / 0.5) @ np.array(BUMPS[phase])
        return bumps / bumps.sum()


def companions(student: Denoiser, teacher: Denoiser, recipe: FlashRecipe) -> dict[str, Companion]:
    """The heads on the teacher's deepest features."""
    if not any(recipe.adversarial_weights):
        return {}
    heads = NetworkFeatures(teacher, deepest=True).heads()
    return {"discriminator": Companion(network=heads, learning_rate=recipe.discriminator_rate)}


def draw(draws: Draws, recipe: FlashRecipe) -> Batch:
    """Data, noise, the start i and one guidance for all rows; times and noises of the two further terms."""
    phase = recipe.phase_at(draws.step)
    start = int(draws.shared.choice(recipe.teacher_steps, p=recipe.start_probabilities(phase)))
    low, high = recipe.guidance
    batch: Batch = {"x0": draws.data(), "noise": draws.noise(), "start": start, "phase": phase}
    batch["guidance"] = float(low + (high - low) * draws.shared.random())
    batch |= {"u": draws.times(*(share * draws.last_time for share in recipe.noise)), "noise_u": draws.noise()}
    chosen = torch.randint(len(JUDGED_AT), (draws.size,), generator=draws.generator)
    batch["t_D"] = torch.tensor(JUDGED_AT)[chosen] * draws.last_time // 999
    return batch | {"noise_D": draws.noise()}


def loss(
    student: Denoiser, teacher: Denoiser, batch: Batch, recipe: FlashRecipe, companions: Companions
) -> torch.Tensor:
    """batch: x0, noise, noise_u, noise_D (B, C, h, w); start: i; phase; u, t_D (B,) times; guidance: a number."""
    text, uncond, phase = batch["text"], batch["uncond"], batch["phase"]
    times = StepPlan.trailing(recipe.teacher_steps, teacher.last_time + 1).timesteps[batch["start"] :]
    z = batch["noise"] if batch["start"] == 0 else teacher.noised(batch["x0"], batch["noise"], times[0])
    x0 = consistency(student, z, times[0], text)
    target = solved(teacher, teacher.guided(text, uncond, batch["guidance"]), z, times, recipe.teacher_solver)
    value = distance(x0, target, recipe.huber)
    if weight := recipe.matching_weights[phase]:
        value = value + weight * matching_loss(student, teacher, x0, batch)
    if "discriminator" in companions:
        weight = recipe.adversarial_weights[phase]
        value = value + adversarial_loss(teacher, x0, batch, text, companions["discriminator"], weight)
    return value


def matching_loss(student: Denoiser, teacher: Denoiser, x0: torch.Tensor, batch: Batch) -> torch.Tensor:
    """mean( (x0 - stopgrad(x0 - gradient))^2 ): as DMD's, with the student itself as the score of its own pictures."""
    text, u = batch["text"], batch["u"]
    with torch.no_grad():
        z_u = teacher.noised(x0, batch["noise_u"], u)
        m = teacher.guided(text, batch["uncond"], batch["guidance"])(z_u, u)
        real, eps_real = teacher.estimates(z_u, m, u)
        _, eps_fake = student.x0_eps(z_u, u, text)
        alpha_u, sigma_u = teacher.scales(u, x0)
        size = (x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-5
        gradient = torch.nan_to_num((eps_real - eps_fake) * sigma_u / alpha_u.clamp_min(1e-5) / size)
    return (x0 - (x0 - gradient).detach()).square().mean()


def adversarial_loss(
    teacher: Denoiser, x0: torch.Tensor, batch: Batch, text: Conditions, heads: Any, weight: float
) -> torch.Tensor:
    """Least squares (Mao et al. 2017) through a sigmoid; the same noise on the student's picture and on data."""
    features, t_D, noise = NetworkFeatures(teacher, deepest=True), batch["t_D"], batch["noise_D"]
    levels = teacher.scales(t_D, x0)
    gradient, fake = adversarial_gradient(
        heads, features, x0, noise, levels, t_D, text, loss=lambda d: (d.sigmoid() - 1).square().mean()
    )
    with torch.no_grad():
        real = features(teacher.noised(batch["x0"], noise, t_D), t_D, text)
    told = (heads(real, text[0]).sigmoid() - 1).square().mean() + heads(fake, text[0]).sigmoid().square().mean()
    return weight * (gradient * x0).sum() + 0.5 * told


METHOD = Method(
    recipe=FlashRecipe, draw=draw, loss=loss, companions=companions, pictures=lambda recipe: True, sampler=SAMPLER
)
