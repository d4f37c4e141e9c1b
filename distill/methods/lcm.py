"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; Song et al. 2023, arXiv 2303.01469, algorithm 2).

    f(z, t) = c_skip(t) z + c_out(t) x0hat(z, t)              c_skip(t) = 0.25 / ((10 t)^2 + 0.25), c_out = 10 t / sqrt(...)
    z_s = one step of the guided teacher from z_t             t, s: neighbours of a grid of N times
    L = mean( sqrt((f_Theta(z_t, t) - stopgrad f_Theta-(z_s, s))^2 + d^2) - d )

Theta-, the target, follows the student by an average of weights. Guidance is of a fixed range and is not told to the student.
The student is drawn with by re-noising: z_s = alpha_s f + sigma_s z, z fresh noise.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from ...core.errors import RecipeError
from ...core.sampler import Sampler
from ...pipelines.networks import Conditions
from ..models import Denoiser, Times, kept_tables
from ..recipe import DistillRecipe, Share
from ..weighting import distance
from .contract import Batch, Companion, Companions, Draws, Method, frozen_copy

SAMPLER = Sampler(kind="renoise", boundary=10.0)  # of diffusers' LCMScheduler


class LcmRecipe(DistillRecipe):
    draws_plans: ClassVar[bool] = False
    method: Literal["lcm"] = "lcm"
    solver_steps: Annotated[int, Field(ge=2)] = 50  # N
    target_decay: Share = 0.95  # of the target's weights per update; 0: the student itself is the target
    huber: Annotated[float, Field(gt=0)] = 1e-3  # d, in units of the latents


def companions(student: Denoiser, teacher: Denoiser, recipe: LcmRecipe) -> dict[str, Companion]:
    """Theta-, a copy of the student."""
    if not recipe.target_decay:
        return {}
    return {"target": frozen_copy(student)}


@torch.no_grad()
def after_update(student: Denoiser, companions: Companions, recipe: LcmRecipe, step: int) -> None:
    """Theta- <- mu Theta- + (1 - mu) Theta."""
    if "target" in companions:
        pairs = zip(companions["target"].parameters(), student.network.parameters(), strict=True)
        for target, own in pairs:
            target.lerp_(own, 1 - recipe.target_decay)


def draw(draws: Draws, recipe: LcmRecipe) -> Batch:
    """Data, noise, two neighbouring times of the grid (t, and s below it) and the guidance of each row."""
    times, steps = draws.last_time + 1, recipe.solver_steps
    if steps > times:
        raise RecipeError(f"solver_steps must be at most the teacher's {times} times, got {steps}")
    i = torch.randint(1, steps + 1, (draws.size,), generator=draws.generator)
    t, s = (times * j // steps - 1 for j in (i, i - 1))  # the last is T, whatever divides what
    guidance = draws.uniform(*recipe.guidance)
    return {"x0": draws.data(), "noise": draws.noise(), "t": t, "s": s.clamp_min(0), "guidance": guidance}


def consistency(denoiser: Denoiser, z: torch.Tensor, t: Times, text: Conditions) -> torch.Tensor:
    """f(z, t), for which f(z, 0) = z."""
    rows = t.view(-1, 1, 1, 1) if isinstance(t, torch.Tensor) else int(t)
    c_skip, c_out = _scalings(denoiser.last_time, z.device, z.dtype)[:, rows]
    return c_skip * z + c_out * denoiser.x0_eps(z, t, text)[0]


@kept_tables
def _scalings(last_time: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """c_skip and c_out at every timestep index (2, T), uploaded once."""
    return torch.from_numpy(np.stack(SAMPLER.scalings(np.arange(last_time + 1)))).to(device, dtype)


def loss(student: Denoiser, teacher: Denoiser, batch: Batch, recipe: LcmRecipe, companions: Companions) -> torch.Tensor:
    """batch: x0, noise (B, C, h, w); t, s (B,) times; guidance (B,)."""
    t, s, text = batch["t"], batch["s"], batch["text"]
    z_t = teacher.noised(batch["x0"], batch["noise"], t)
    prediction = consistency(student, z_t, t, text)
    with torch.no_grad():
        m = teacher.guided(text, batch["uncond"], batch["guidance"])(z_t, t)
        z_s = teacher.noised(*teacher.estimates(z_t, m, t), s)
        follower = student.with_network(companions["target"]) if "target" in companions else student
        target = consistency(follower, z_s, s, text)
    return distance(prediction, target, recipe.huber)


METHOD = Method(
    recipe=LcmRecipe,
    draw=draw,
    loss=loss,
    companions=companions,
    after_update=after_update,
    pictures=lambda recipe: True,
    sampler=SAMPLER,
)
