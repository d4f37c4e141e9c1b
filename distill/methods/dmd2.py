"""Improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867), with backward simulation.

    z_t = the student's own steps from pure noise (x0, then fresh noise, ...), without gradient;  x0_Theta = x0hat(z_t, t)
    gradient of L_dm by x0_Theta: (x0_Psi - x0_Phi,w) / mean |x0_Theta - x0_Phi,w|,  both at x0_Theta noised to u
    L_gan = mean softplus(- h(Psi's features of x0_Theta noised))
    Psi, the fake score, learns to denoise x0_Theta, and with its head h to tell it from data:
    L_Psi = || m_Psi - m ||^2 + w_cls mean( softplus(h(fake)) + softplus(-h(real)) )

m is what the networks predict (epsilon for Stable Diffusion, as in the authors' code), so that Psi learns at every time with the
weight that its network was trained with. For a v network || eps_Psi - eps ||^2 would weigh the error by alpha^2: nothing at T.
Psi learns in every update, the student in one of `ratio`. Drawn with by re-noising.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.nn import functional

from ...pipelines.networks import Conditions
from ..backward import rollout, table_of
from ..discriminator import NetworkFeatures, adversarial_gradient
from ..models import Denoiser
from ..recipe import DistillRecipe, Positive, Share
from .contract import RENOISE, Batch, Companion, Companions, Draws, Method


class Dmd2Recipe(DistillRecipe):
    method: Literal["dmd2"] = "dmd2"
    ratio: Positive = 5  # updates of the fake score per update of the student
    fake_score_rate: Annotated[float, Field(gt=0)] = 1e-4
    gan_weight: Annotated[float, Field(ge=0)] = 3e-3  # 0: no pictures are needed
    classification_weight: Annotated[float, Field(ge=0)] = 1e-2
    noise: tuple[Share, Share] = (0.02, 0.98)  # u / T


def companions(student: Denoiser, teacher: Denoiser, recipe: Dmd2Recipe) -> dict[str, Companion]:
    """Psi, which begins as the teacher and trains in float32, and its head."""
    fake_score = copy.deepcopy(teacher.network).float().requires_grad_(True)
    found = {"fake_score": Companion(network=fake_score, learning_rate=recipe.fake_score_rate)}
    if recipe.gan_weight:
        heads = NetworkFeatures(teacher, deepest=True).heads()
        found["discriminator"] = Companion(network=heads, learning_rate=recipe.fake_score_rate)
    return found


def draw(draws: Draws, recipe: Dmd2Recipe) -> Batch:
    """Noises of the student's steps, its turn, times and noises of the scores and of the discriminator, and data."""
    plan, index = draws.step_of_plan(recipe)
    fresh = tuple(draws.noise() for _ in range(index))
    batch: Batch = {"x_T": draws.noise(), "fresh": fresh, "plan": plan, "index": index}
    batch |= {"student_learns": draws.step % recipe.ratio == 0, "guidance": draws.uniform(*recipe.guidance)}
    batch |= {"u": draws.times(*(share * draws.last_time for share in recipe.noise)), "noise_u": draws.noise()}
    batch |= {"q": draws.times(0, draws.last_time + 1), "noise_q": draws.noise()}
    if recipe.gan_weight:
        batch |= {"real": draws.data(), "t_D": draws.times(0, draws.last_time + 1)}
        batch |= {"noise_fake": draws.noise(), "noise_real": draws.noise()}
    return batch


def loss(
    student: Denoiser, teacher: Denoiser, batch: Batch, recipe: Dmd2Recipe, companions: Companions
) -> torch.Tensor:
    """batch: x_T, fresh, noise_* (B, C, h, w); plan, index: the step; u, q, t_D (B,) times; guidance (B,)."""
    text, index = batch["text"], batch["index"]
    fake_score = teacher.with_network(companions["fake_score"])
    table = table_of(student, recipe.plans[batch["plan"]], sampler=RENOISE)
    z = rollout(lambda x, t: student(x, t, text), batch["x_T"], table, index, noises=batch["fresh"])
    with torch.set_grad_enabled(batch["student_learns"] and torch.is_grad_enabled()):
        x0, _ = student.x0_eps(z, int(table.timesteps[index]), text)
    value = score_loss(fake_score, x0.detach(), batch, text)
    if batch["student_learns"]:
        value = value + matching_loss(teacher, fake_score, x0, batch, text)
    if recipe.gan_weight:
        value = value + discriminator_loss(fake_score, x0, batch, text, recipe, companions["discriminator"])
    return value


def score_loss(fake_score: Denoiser, x0: torch.Tensor, batch: Batch, text: Conditions) -> torch.Tensor:
    """|| m_Psi - m ||^2 on the student's pictures."""
    noise, q = batch["noise_q"], batch["q"]
    said = fake_score(fake_score.noised(x0, noise, q), q, text)
    return (said - fake_score.target(x0, noise, q)).square().mean()


def matching_loss(
    teacher: Denoiser, fake_score: Denoiser, x0: torch.Tensor, batch: Batch, text: Conditions
) -> torch.Tensor:
    """1/2 mean( (x0 - stopgrad(x0 - gradient))^2 ): its gradient by x0 is the gradient of distribution matching."""
    with torch.no_grad():
        u = batch["u"]
        z_u = teacher.noised(x0, batch["noise_u"], u)
        m = teacher.guided(text, batch["uncond"], batch["guidance"])(z_u, u)
        real, fake = teacher.estimates(z_u, m, u)[0], fake_score.x0_eps(z_u, u, text)[0]
        size = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5)
        gradient = torch.nan_to_num((fake - real) / size)
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def discriminator_loss(
    fake_score: Denoiser, x0: torch.Tensor, batch: Batch, text: Conditions, recipe: Dmd2Recipe, heads: Any
) -> torch.Tensor:
    """The classification loss of Psi and its head; and in the student's turn L_gan, with no gradient to them."""
    features, t_D = NetworkFeatures(fake_score, deepest=True), batch["t_D"]
    fake = features(fake_score.noised(x0.detach(), batch["noise_fake"], t_D), t_D, text)
    real = features(fake_score.noised(batch["real"], batch["noise_real"], t_D), t_D, text)
    classes = functional.softplus(heads(fake, text[0])).mean() + functional.softplus(-heads(real, text[0])).mean()
    value = recipe.classification_weight * classes
    if batch["student_learns"]:
        levels = fake_score.scales(t_D, x0)
        gradient, _ = adversarial_gradient(
            heads, features, x0, batch["noise_fake"], levels, t_D, text, loss=lambda d: functional.softplus(-d).mean()
        )
        value = value + recipe.gan_weight * (gradient * x0).sum()
    return value


METHOD = Method(
    recipe=Dmd2Recipe,
    draw=draw,
    loss=loss,
    companions=companions,
    pictures=lambda recipe: recipe.gan_weight > 0,
    sampler=RENOISE,
)
