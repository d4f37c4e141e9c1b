"""The loss of a distillation step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core.plan import StepPlan
from ..core.update import update_table
from .backward import TeacherTarget, choose_noise, renoised, rollout, shifted_time
from .discriminator import Discriminator, Features, adversarial_gradient, hinge_loss, r1_penalty
from .networks import Networks
from .recipe import Adversarial, DistillRecipe


def loss_weight(kind: str, alpha_t: float, sigma_t: float) -> float:
    """What a squared error of x0 counts at a noise level: as it is, or as the error of v, or of eps, that it stands for.

    From x_t = alpha x0 + sigma eps: an error d of x0 is one of d / sigma in v and of alpha d / sigma in eps.
    """
    snr = (alpha_t / sigma_t) ** 2
    return {"x0": 1.0, "v": 1.0 / sigma_t**2, "eps": snr, "truncated_snr": max(1.0, snr)}[kind]


class ImagineFlashLoss(nn.Module):
    """|| x0hat(f_Phi^k(chi), eps_Phi) - x0_Theta ||^2 with backward distillation and the shifted reconstruction, and where the
    recipe says so the discriminator.

    Only `student` and `discriminator` have parameters that train; teacher and text encoder are frozen and not part of the module.
    """

    def __init__(self, student: nn.Module, teacher: Networks, recipe: DistillRecipe) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe
        self._frozen = (teacher, TeacherTarget(teacher, recipe.teacher_steps))  # a tuple: not registered as a submodule
        self._tables = {
            steps: update_table(
                teacher.schedule,
                StepPlan(timesteps),
                teacher.prediction_type,
                noise_correction=recipe.rollout_noise_correction,
            )
            for steps, timesteps in recipe.plans.items()
        }
        if recipe.adversarial is not None:
            features = Features(teacher.unet)
            self._features = (features,)
            self.discriminator = Discriminator(features.channels, teacher.text_encoder.config.hidden_size)

    def forward(
        self,
        x_T: torch.Tensor,
        text: torch.Tensor,
        uncond: torch.Tensor,
        guidance: torch.Tensor,
        fresh: torch.Tensor,
        plan: int,
        index: int,
        shifted: bool | None = None,
        judged: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """One step of the plan with `plan` steps at position `index`.

        x_T, fresh (B, C, h, w) unit noise; text, uncond (B, L, D); guidance (B,). shifted: whether the target is the shifted
        one, by default the recipe's. judged: what the discriminator sees; see `_adversarial`.
        """
        teacher, _ = self._frozen
        table, recipe = self._tables[plan], self.recipe
        t = int(table.timesteps[index])

        def student(x: torch.Tensor, time: int) -> torch.Tensor:
            return self.student(x, torch.full((x.shape[0],), time, device=x.device), encoder_hidden_states=text).sample

        x_t = rollout(student, x_T, table, index)
        times = torch.full((x_t.shape[0],), t, device=x_t.device)
        x0, eps = teacher.x0_eps(x_t, times, text, unet=self.student)
        start, start_t = x_t, t
        if recipe.shifted if shifted is None else shifted:
            start_t = shifted_time(t, recipe.gamma)
            own = x_T if index == 0 and recipe.rollout_noise_correction else eps  # what its own step goes on with
            start = renoised(x0, choose_noise(recipe.renoise, own, fresh, x_T), start_t, teacher)
        target = self._target(start, start_t, text, uncond, guidance)
        alpha_t, sigma_t = (float(v) for v in teacher.schedule.at(t))
        loss = loss_weight(recipe.loss_weight, alpha_t, sigma_t) * (x0 - target).square().mean()
        if recipe.adversarial is not None and judged is not None:
            (gradient,) = torch.autograd.grad(loss, x0, retain_graph=True)
            loss = loss + self._adversarial(x0, gradient, text, recipe.adversarial, **judged)
        return loss

    def _target(
        self, x: torch.Tensor, t: int, text: torch.Tensor, uncond: torch.Tensor, guidance: torch.Tensor
    ) -> torch.Tensor:
        """The teacher's clean estimate from (x, t); its guidance falls with t where the recipe says to what."""
        teacher, target_of = self._frozen
        if (least := self.recipe.guidance_at_0) is not None:
            guidance = least + (guidance - least) * (t / (teacher.schedule.num_train_timesteps - 1))
        return target_of(x, t, text, uncond, guidance)

    def _adversarial(
        self,
        x0: torch.Tensor,
        regression: torch.Tensor,
        text: torch.Tensor,
        settings: Adversarial,
        *,
        real: torch.Tensor,
        noise: torch.Tensor,
        noise_real: torch.Tensor,
        t: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        """The student's adversarial term, whose gradient by x0 is `share` times as long as the regression's, and the heads' loss.

        real (B, C, h, w) latents of pictures with the same captions; noise, noise_real unit noise; t (B,) noise levels.
        """
        teacher, _ = self._frozen
        (features,) = self._features
        levels = teacher.signal_and_noise(t)
        pull, fake = adversarial_gradient(self.discriminator, features, x0, noise, levels, t, text)
        with torch.no_grad():
            genuine = features(levels[0] * real + levels[1] * noise_real, t, text)
        scale = share * regression.norm() / pull.norm().clamp_min(1e-12)
        heads = hinge_loss(self.discriminator(genuine, text), self.discriminator(fake, text))
        heads = heads + settings.r1 * r1_penalty(self.discriminator, genuine, text)
        return (scale * pull * x0).sum() + heads

    def parameter_groups(self) -> dict[str, tuple[nn.Module, float, tuple[float, float]]]:
        """Parts with a learning rate and betas of their own; the rest goes by the recipe's `fit`."""
        if self.recipe.adversarial is None:
            return {}
        return {"discriminator": (self.discriminator, self.recipe.adversarial.learning_rate, (0.0, 0.99))}
