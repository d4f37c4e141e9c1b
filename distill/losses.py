"""The loss of a distillation step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..core.plan import StepPlan
from ..core.update import update_table
from .backward import TeacherTarget, choose_noise, renoised, rollout, shifted_time
from .networks import Networks
from .recipe import DistillRecipe


class ImagineFlashLoss(nn.Module):
    """|| x0hat(f_Phi^k(chi), eps_Phi) - x0_Theta ||^2 with backward distillation and the shifted reconstruction.

    Only `student` has parameters that train; the teacher and the text encoder are frozen and not part of the module.
    """

    def __init__(self, student: nn.Module, teacher: Networks, recipe: DistillRecipe) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe
        self._frozen = (teacher, TeacherTarget(teacher, recipe.teacher_steps))  # a tuple: not registered as a submodule
        self._tables = {
            steps: update_table(
                teacher.schedule, StepPlan(timesteps), teacher.prediction_type,
                noise_correction=recipe.rollout_noise_correction,
            )
            for steps, timesteps in recipe.plans.items()
        }  # fmt: skip

    def forward(
        self, x_T: torch.Tensor, text: torch.Tensor, uncond: torch.Tensor, guidance: torch.Tensor, fresh: torch.Tensor,
        plan: int, index: int,
    ) -> torch.Tensor:  # fmt: skip
        """One step of the plan with `plan` steps at position `index`.

        x_T, fresh (B, C, h, w) unit noise; text, uncond (B, L, D); guidance (B,).
        """
        teacher, target_of = self._frozen
        table = self._tables[plan]
        t = int(table.timesteps[index])

        def student(x: torch.Tensor, time: int) -> torch.Tensor:
            return self.student(x, torch.full((x.shape[0],), time, device=x.device), encoder_hidden_states=text).sample

        x_t = rollout(student, x_T, table, index)
        times = torch.full((x_t.shape[0],), t, device=x_t.device)
        x0, eps = teacher.x0_eps(x_t, times, text, unet=self.student)
        start, start_t = x_t, t
        if self.recipe.shifted:
            start_t = shifted_time(t, self.recipe.gamma)
            start = renoised(x0, choose_noise(self.recipe.renoise, eps, fresh, x_T), start_t, teacher)
        target = target_of(start, start_t, text, uncond, guidance)
        return functional.mse_loss(x0, target)  # an adversarial term on x0 is added here once there is a discriminator
