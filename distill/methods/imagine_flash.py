"""Imagine Flash (Kohler et al. 2024, arXiv 2405.05224, section 3): backward distillation and the shifted reconstruction loss.

    x_{T->t} = stopgrad(f_Theta(... f_Theta(x_T)))                               the student's own state, from pure noise
    chi = alpha_{gamma(t)} stopgrad(x0_Theta) + sigma_{gamma(t)} eps'            its prediction, re-noised to a shifted time
    L = w(t) || x0hat(f_Phi^k(chi), eps_Phi, gamma(t)) - x0_Theta ||^2  (- share x D(x0_Theta))

f is one deterministic step, Phi the guided teacher, Theta the student, x0_Theta its prediction at x_{T->t}. What the paper
leaves open (gamma, k, eps', the discriminator's form) is a field of the recipe. Its ablation leaves each part out: without
backward distillation x_t = alpha_t x0 + sigma_t eps of a picture x0, at t = T too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from ...core.errors import RecipeError
from ...pipelines.networks import Conditions
from ..backward import Solver, choose_noise, rollout, shifted_time, table_of, teacher_target
from ..discriminator import NetworkFeatures, adversarial_gradient, hinge_loss, r1_penalty
from ..models import Denoiser
from ..recipe import DistillRecipe, Frozen, Positive, Share
from ..weighting import distance, kind_for, loss_weight
from .contract import Batch, Companion, Companions, Draws, Method


class Adversarial(Frozen):
    """The discriminator: heads on the frozen teacher's features of noised latents (its form is open in the paper)."""

    share: Share = 0.3  # the length of its gradient by x0 over the regression's
    first_share: Share | None = None  # the same at a plan's first step, where most is left to add; None: share
    ramp: Annotated[int, Field(ge=0)] = 500  # updates in which the share grows from 0, so that the heads learn first
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    r1: Annotated[float, Field(ge=0)] = 1e-2
    noise: tuple[Share, Share] = (0.0, 0.75)  # noise levels t / T at which it looks


class ImagineFlashRecipe(DistillRecipe):
    method: Literal["imagine_flash"] = "imagine_flash"
    backward_distillation: bool = (
        True  # False: pictures with noise instead of the student's own states, as others train
    )
    shifted: bool = True  # shifted reconstruction loss; False: the teacher starts from the student's own state
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.75  # gamma(t) = gamma * t
    first_gamma: Annotated[float, Field(gt=0, le=1)] | None = None  # the same at a plan's first step; None: gamma
    renoise: Literal["own", "fresh", "initial"] = "own"  # the noise in chi: the student's own eps, a new draw, or x_T
    teacher_steps: Positive = 4  # k
    teacher_steps_fall: Annotated[float, Field(ge=0)] = 0.0  # from time t it takes k (t / T)^fall steps, at least 2
    teacher_solver: Solver = "ddim"  # of these k steps; of few, dpm_solver++ ends nearer to what many end at
    plain_share: Share = (
        0.0  # of the updates with the plain target: with `own` noise, chi is the student's own next state
    )
    loss_weight: Literal["auto", "x0", "v", "eps", "sqrt_snr", "truncated_snr"] = "x0"  # epsilon needs eps or sqrt_snr
    huber: Annotated[float, Field(gt=0)] | None = None  # d of the pseudo-Huber loss; None: the squared error
    guidance_at_0: float | None = None  # what the guidance falls to, linearly in t; None: it stays
    adversarial: Adversarial | None = None
    noise_correction: bool = True
    rollout_noise_correction: bool | None = None  # in the training rollout; None: as at inference

    @model_validator(mode="after")
    def _one_sampler(self) -> Self:
        if self.rollout_noise_correction is None:
            object.__setattr__(self, "rollout_noise_correction", self.noise_correction)
        return self


def check(teacher: Denoiser, recipe: ImagineFlashRecipe) -> None:
    """Raises RecipeError for a weight with which a plan's first step learns nothing."""
    kind = kind_for(recipe.loss_weight, teacher.prediction_type)
    if not loss_weight(kind, *teacher.scales(teacher.last_time, torch.empty(0))):
        raise RecipeError(
            f"loss_weight {kind} weighs nothing at timestep {teacher.last_time}, where this teacher's pictures are pure noise: the "
            "first step would learn nothing; write loss_weight: v"
        )


def companions(student: Denoiser, teacher: Denoiser, recipe: ImagineFlashRecipe) -> dict[str, Companion]:
    """The discriminator's heads, where the recipe has one."""
    if recipe.adversarial is None:
        return {}
    heads = NetworkFeatures(teacher).heads()
    return {"discriminator": Companion(network=heads, learning_rate=recipe.adversarial.learning_rate)}


def draw(draws: Draws, recipe: ImagineFlashRecipe) -> Batch:
    """x_T, a step of a plan, the guidance, the noise of chi; and what the discriminator sees."""
    plan, index = draws.step_of_plan(recipe)
    plain = bool(draws.shared.random() < recipe.plain_share)
    batch: Batch = {"x_T": draws.noise(), "fresh": draws.noise(), "guidance": draws.uniform(*recipe.guidance)}
    batch |= {"plan": plan, "index": index, "shifted": recipe.shifted and not plain}
    if not recipe.backward_distillation:
        batch["data"] = draws.data()
    if (settings := recipe.adversarial) is not None:
        batch["real"] = draws.data()
        batch["t"] = draws.times(*(share * draws.last_time for share in settings.noise))
        batch |= {"noise": draws.noise(), "noise_real": draws.noise()}
        share = settings.share if index or settings.first_share is None else settings.first_share
        batch["share"] = share * min(1.0, draws.step / max(1, settings.ramp))
    return batch


def steps_from(t: float, last_time: int, recipe: ImagineFlashRecipe) -> int:
    """How many steps the teacher takes from time t: from little noise few end where many do."""
    k = recipe.teacher_steps
    return max(min(k, 2), round(k * (t / last_time) ** recipe.teacher_steps_fall))


def loss(
    student: Denoiser, teacher: Denoiser, batch: Batch, recipe: ImagineFlashRecipe, companions: Companions
) -> torch.Tensor:
    """batch: x_T, fresh (B, C, h, w) unit noise; guidance (B,); plan, index: the step; shifted: whether the target is; data
    (B, C, h, w): latents of pictures, where the recipe has no backward distillation."""
    x_T, text, index = batch["x_T"], batch["text"], batch["index"]
    table = table_of(student, recipe.plans[batch["plan"]], noise_correction=bool(recipe.rollout_noise_correction))
    t = int(table.timesteps[index])
    if recipe.backward_distillation:
        x_t = rollout(lambda x, time: student(x, time, text), x_T, table, index)
    else:
        x_t = teacher.noised(batch["data"], x_T, t)
    x0, eps = student.x0_eps(x_t, t, text)
    start, start_t = x_t, t
    if batch["shifted"]:
        gamma = recipe.gamma if index or recipe.first_gamma is None else recipe.first_gamma
        start_t = shifted_time(t, gamma)
        own = x_t if index == 0 and recipe.rollout_noise_correction else eps  # what its own step goes on with
        noise = choose_noise(recipe.renoise, own, batch["fresh"], x_T)
        start = teacher.noised(x0.detach(), noise.detach(), start_t)  # chi
    guidance = batch["guidance"]
    if (least := recipe.guidance_at_0) is not None:
        guidance = least + (guidance - least) * (start_t / teacher.last_time)
    k, solver = steps_from(start_t, teacher.last_time, recipe), recipe.teacher_solver
    target = teacher_target(teacher, start, start_t, k, text, batch["uncond"], guidance, solver=solver)
    kind = kind_for(recipe.loss_weight, teacher.prediction_type)
    value = loss_weight(kind, *teacher.scales(t, x0)) * distance(x0, target, recipe.huber)
    if recipe.adversarial is not None:
        (regression,) = torch.autograd.grad(value, x0, retain_graph=True)
        value = value + adversarial_loss(x0, regression, text, batch, teacher, companions, recipe.adversarial)
    return value


def adversarial_loss(
    x0: torch.Tensor,
    regression: torch.Tensor,
    text: Conditions,
    batch: Batch,
    teacher: Denoiser,
    companions: Companions,
    settings: Adversarial,
) -> torch.Tensor:
    """The student's adversarial term, whose gradient by x0 is `share` times as long as the regression's, and the heads' loss.

    batch: real (B, C, h, w) latents of pictures with the same prompts; noise, noise_real unit noise; t (B,) noise levels.
    """
    heads: Any = companions["discriminator"]
    features, levels, t = NetworkFeatures(teacher), teacher.scales(batch["t"], x0), batch["t"]
    gradient, fake = adversarial_gradient(heads, features, x0, batch["noise"], levels, t, text)
    with torch.no_grad():
        real = features(levels[0] * batch["real"] + levels[1] * batch["noise_real"], t, text)
    scale = batch["share"] * regression.norm() / gradient.norm().clamp_min(1e-12)
    value = hinge_loss(heads(real, text[0]), heads(fake, text[0])) + settings.r1 * r1_penalty(heads, real, text[0])
    return (scale * gradient * x0).sum() + value


METHOD = Method(
    recipe=ImagineFlashRecipe,
    draw=draw,
    loss=loss,
    check=check,
    companions=companions,
    pictures=lambda recipe: recipe.adversarial is not None or not recipe.backward_distillation,
)
