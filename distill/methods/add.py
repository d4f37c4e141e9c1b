"""Adversarial diffusion distillation (Sauer et al. 2023, arXiv 2311.17042), with the teacher's features as LADD has them
(Sauer et al. 2024, arXiv 2403.12015): the paper's DINOv2 and its pictures from the VAE's decoder are not needed.

    x0_Theta = x0hat(z_t, t),  z_t from data, pure noise at T                              t: a time of the student's plans
    L_dist = mean( alpha_u || x0_Theta - stopgrad x0_Phi,w(alpha_u x0_Theta + sigma_u eps', u) ||^2 )
    L_G = - mean D(F(x0_Theta noised to t_D))          L_D = hinge + gamma R1, on data and on stopgrad x0_Theta
    L = L_G + lambda L_dist

F: frozen teacher, D: heads on what its layers give. Drawn with by re-noising.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from ..discriminator import NetworkFeatures, adversarial_gradient, hinge_loss, r1_penalty
from ..models import Denoiser
from ..recipe import DistillRecipe, Share
from .contract import RENOISE, Batch, Companion, Companions, Draws, Method


class AddRecipe(DistillRecipe):
    method: Literal["add"] = "add"
    distillation_weight: Annotated[float, Field(ge=0)] = 2.5  # lambda
    r1: Annotated[float, Field(ge=0)] = 1e-5  # gamma
    discriminator_rate: Annotated[float, Field(gt=0)] = 1e-4
    teacher_noise: tuple[Share, Share] = (0.02, 0.98)  # u / T
    discriminator_noise: tuple[Share, Share] = (0.0, 0.75)  # t_D / T


def companions(student: Denoiser, teacher: Denoiser, recipe: AddRecipe) -> dict[str, Companion]:
    """The heads on the teacher's features."""
    heads = NetworkFeatures(teacher).heads()
    return {"discriminator": Companion(network=heads, learning_rate=recipe.discriminator_rate)}


def draw(draws: Draws, recipe: AddRecipe) -> Batch:
    """Data, noise, a step of a plan; the teacher's time and noise; the discriminator's times and noises."""
    plan, index = draws.step_of_plan(recipe)
    batch: Batch = {"x0": draws.data(), "noise": draws.noise(), "plan": plan, "index": index}
    batch |= {"guidance": draws.uniform(*recipe.guidance), "noise_teacher": draws.noise()}
    for name, (low, high) in (("u", recipe.teacher_noise), ("t_D", recipe.discriminator_noise)):
        batch[name] = draws.times(low * draws.last_time, high * draws.last_time)
    return batch | {"noise_fake": draws.noise(), "noise_real": draws.noise()}


def loss(student: Denoiser, teacher: Denoiser, batch: Batch, recipe: AddRecipe, companions: Companions) -> torch.Tensor:
    """batch: x0 and the noises (B, C, h, w); plan, index: the step; u, t_D (B,) times; guidance (B,)."""
    x0, distillation = distillation_loss(student, teacher, batch, recipe)
    text = batch["text"]
    heads: Any = companions["discriminator"]
    features, t_D = NetworkFeatures(teacher), batch["t_D"]
    levels = teacher.scales(t_D, x0)
    gradient, fake = adversarial_gradient(heads, features, x0, batch["noise_fake"], levels, t_D, text)
    with torch.no_grad():
        real = features(teacher.noised(batch["x0"], batch["noise_real"], t_D), t_D, text)
    judgement = hinge_loss(heads(real, text[0]), heads(fake, text[0])) + recipe.r1 * r1_penalty(heads, real, text[0])
    return recipe.distillation_weight * distillation + (gradient * x0).sum() + judgement


def distillation_loss(
    student: Denoiser, teacher: Denoiser, batch: Batch, recipe: AddRecipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0_Theta and L_dist."""
    text, index, u = batch["text"], batch["index"], batch["u"]
    t = recipe.plans[batch["plan"]][index]
    z = batch["noise"] if index == 0 else teacher.noised(batch["x0"], batch["noise"], t)
    x0, _ = student.x0_eps(z, t, text)
    with torch.no_grad():
        z_u = teacher.noised(x0, batch["noise_teacher"], u)
        m = teacher.guided(text, batch["uncond"], batch["guidance"])(z_u, u)
        target, _ = teacher.estimates(z_u, m, u)
    alpha_u, _ = teacher.scales(u, x0)
    return x0, (alpha_u * (x0 - target).square()).mean()


METHOD = Method(
    recipe=AddRecipe, draw=draw, loss=loss, companions=companions, pictures=lambda recipe: True, sampler=RENOISE
)
