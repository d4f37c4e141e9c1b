"""Guidance, then progressive distillation (Meng et al. 2023, arXiv 2210.03142, on Salimans & Ho 2022, arXiv 2202.00512).

    guidance:     L = max(snr, 1) || x0_Theta(z_t) - stopgrad x0_Phi,w(z_t) ||^2                t uniform over all times
    progressive:  z'' = two deterministic steps of the last round's student from z_t            t on a grid of N times
                  L = max(snr, 1) || x0_Theta(z_t) - (z'' - r z_t) / (alpha'' - r alpha_t) ||^2, r = sigma'' / sigma_t

Rounds halve N from `first_steps` to the steps of the recipe's plan. w is the recipe's guidance and is not told to the student:
the row "step distillation" of the paper's table. Drawn with by deterministic steps.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from ...core.plan import StepPlan
from ..models import Denoiser
from ..recipe import DistillRecipe
from ..weighting import loss_weight
from .contract import Batch, Companion, Companions, Draws, Method, frozen_copy


class StepDistillationRecipe(DistillRecipe):
    draws_plans: ClassVar[bool] = False
    draws_by_length: ClassVar[bool] = True
    method: Literal["step_distillation"] = "step_distillation"
    plans: dict[int, tuple[int, ...]] = Field(default={4: (999, 749, 499, 249)}, min_length=1)
    first_steps: Annotated[int, Field(ge=2)] = 16  # N of the first round; each round halves it
    guidance_share: Annotated[float, Field(gt=0, lt=1)] = 0.25  # of the updates; the rounds share the rest equally

    @model_validator(mode="after")
    def _one_plan_that_halving_reaches(self) -> Self:
        if len(self.plans) != 1:
            raise ValueError(f"plans must hold one plan: the last round fits its steps alone, got {sorted(self.plans)}")
        (last,) = self.plans
        ratio = self.first_steps // last
        if ratio * last != self.first_steps or ratio & (ratio - 1):
            raise ValueError(f"first_steps must be {last} times a power of 2, got {self.first_steps}")
        grid = StepPlan.trailing(last, self.plans[last][0] + 1).timesteps
        if self.plans[last] != grid:
            raise ValueError(f"plans must be the grid of the last round, {list(grid)}, got {list(self.plans[last])}")
        return self

    @property
    def rounds(self) -> list[int]:
        """N of each round."""
        (last,) = self.plans
        found = [self.first_steps]
        while found[-1] > last:
            found.append(found[-1] // 2)
        return found

    def steps_at(self, step: int) -> int | None:
        """N of the round that an update belongs to; None while guidance is distilled."""
        first = round(self.guidance_share * self.fit.steps)
        if step < first:
            return None
        rounds = self.rounds
        return rounds[min(len(rounds) - 1, (step - first) * len(rounds) // max(1, self.fit.steps - first))]


def companions(student: Denoiser, teacher: Denoiser, recipe: StepDistillationRecipe) -> dict[str, Companion]:
    """The last round's student."""
    return {"last_round": frozen_copy(student)}


@torch.no_grad()
def after_update(student: Denoiser, companions: Companions, recipe: StepDistillationRecipe, step: int) -> None:
    """At the end of a round its student becomes what the next one is taught by."""
    if recipe.steps_at(step + 1) != recipe.steps_at(step):
        companions["last_round"].load_state_dict(student.network.state_dict())


def draw(draws: Draws, recipe: StepDistillationRecipe) -> Batch:
    """Data, noise, and a time of each row: any for guidance; for a round t and the two times below it (-1: clean)."""
    batch: Batch = {"x0": draws.data(), "noise": draws.noise(), "guidance": draws.uniform(*recipe.guidance)}
    steps = recipe.steps_at(draws.step)
    if steps is None:
        return batch | {"t": torch.randint(draws.last_time + 1, (draws.size,), generator=draws.generator)}
    grid = torch.tensor([-1, *StepPlan.trailing(2 * steps, draws.last_time + 1).timesteps[::-1]])  # clean, then noisier
    j = torch.randint(1, steps + 1, (draws.size,), generator=draws.generator)
    return batch | {"t": grid[2 * j], "middle": grid[2 * j - 1], "s": grid[2 * j - 2]}


def loss(
    student: Denoiser, teacher: Denoiser, batch: Batch, recipe: StepDistillationRecipe, companions: Companions
) -> torch.Tensor:
    """batch: x0, noise (B, C, h, w); t (B,); in a round also middle and s (B,), the next two times; guidance (B,)."""
    t, text = batch["t"], batch["text"]
    pure = (t == teacher.last_time).view(-1, 1, 1, 1)
    z = torch.where(pure, batch["noise"], teacher.noised(batch["x0"], batch["noise"], t))
    with torch.no_grad():
        if "s" not in batch:
            m = teacher.guided(text, batch["uncond"], batch["guidance"])(z, t)
            target, _ = teacher.estimates(z, m, t)
        else:
            target = two_steps(student.with_network(companions["last_round"]), z, batch, text)
    x0, _ = student.x0_eps(z, t, text)
    weight = loss_weight("truncated_snr", *teacher.scales(t, z))
    return (weight * (x0 - target).square()).mean()


def two_steps(denoiser: Denoiser, z: torch.Tensor, batch: Batch, text: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The x0 with which one deterministic step from t to s lands where two of `denoiser` land."""
    z_middle = landed(denoiser, *denoiser.x0_eps(z, batch["t"], text), batch["middle"])
    z_s = landed(denoiser, *denoiser.x0_eps(z_middle, batch["middle"], text), batch["s"])
    alpha_t, sigma_t = denoiser.scales(batch["t"], z)
    alpha_s, sigma_s = scales_or_clean(denoiser, batch["s"], z)
    r = sigma_s / sigma_t
    return (z_s - r * z) / (alpha_s - r * alpha_t)


def landed(denoiser: Denoiser, x0: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """alpha_s x0 + sigma_s eps."""
    alpha_s, sigma_s = scales_or_clean(denoiser, s, x0)
    return alpha_s * x0 + sigma_s * eps


def scales_or_clean(denoiser: Denoiser, s: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_s and sigma_s (B, 1, 1, 1); 1 and 0 where s is -1."""
    clean = (s < 0).view(-1, 1, 1, 1)
    alpha_s, sigma_s = denoiser.scales(s.clamp_min(0), like)
    return torch.where(clean, 1.0, alpha_s), torch.where(clean, 0.0, sigma_s)


METHOD = Method(
    recipe=StepDistillationRecipe,
    draw=draw,
    loss=loss,
    companions=companions,
    after_update=after_update,
    pictures=lambda recipe: True,
)
