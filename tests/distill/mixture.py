"""Two-dimensional data of four classes with two modes each, a small network that has learnt it, and how far samples are off."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from imagine_flash.core.plan import StepPlan
from imagine_flash.core.sampler import DETERMINISTIC, Sampler
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.distill.backward import rollout, table_of
from imagine_flash.distill.discriminator import FeatureLayers
from imagine_flash.distill.methods import distill_recipe, method_named
from imagine_flash.distill.methods.contract import DistillationLoss, Draws
from imagine_flash.distill.models import Denoiser
from imagine_flash.distill.optimizers import build_optimizers, rate_factor
from imagine_flash.distill.reproducible import seeded
from imagine_flash.tests.distill.toy import SD_CONFIG

CLASSES, WIDTH, GUIDANCE = 4, 96, 2.0
Text = tuple[torch.Tensor]


def data(classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """x0 (B, 2, 1, 1): class k stands at angle k 90 degrees, its two modes to both sides."""
    angle = classes * (2 * math.pi / CLASSES)
    side = torch.randint(2, classes.shape, generator=generator) * 2 - 1
    centre = torch.stack([angle.cos(), angle.sin()], 1) + 0.4 * side[:, None] * torch.stack(
        [-angle.sin(), angle.cos()], 1
    )
    return (centre + 0.08 * torch.randn(centre.shape, generator=generator))[..., None, None]


def text_of(classes: torch.Tensor) -> Text:
    """One-hot (B, 1, CLASSES + 1); class CLASSES is no text."""
    return (nn.functional.one_hot(classes, CLASSES + 1).float()[:, None],)


class _AsMap(nn.Module):
    """(B, C) -> (B, C, 1, 1), as features of pictures are."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[..., None, None]


class PointHeads(nn.Module):
    """The discriminator's heads without convolutions, which are slow on maps of one place."""

    def __init__(self, channels: Sequence[int], text_width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(c + text_width, 64), nn.SiLU(), nn.Linear(64, 1)) for c in channels
        )

    def forward(self, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        rows = [torch.cat([level.flatten(1), text[:, 0]], 1) for level in features]
        return torch.cat([head(row) for head, row in zip(self.heads, rows, strict=True)], 1)


class PointNetwork(nn.Module):
    """(x_t (B, 2, 1, 1), t (B,), one-hot text) -> (B, 2, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2 + 16 + CLASSES + 1, WIDTH)
        self.middle = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.maps = nn.ModuleList(_AsMap() for _ in range(2))
        self.last = nn.Linear(WIDTH, 2)

    @property
    def feature_layers(self) -> FeatureLayers:
        return FeatureLayers(tuple(self.maps), (WIDTH, WIDTH), CLASSES + 1, build_heads=PointHeads)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        frequencies = torch.arange(1, 9) * (math.pi / 2)
        phase = (t[:, None] / 1000) * frequencies
        hidden = nn.functional.silu(self.first(torch.cat([x_t.flatten(1), phase.sin(), phase.cos(), text[:, 0]], 1)))
        for layer, as_map in zip(self.middle, self.maps, strict=True):
            hidden = hidden + nn.functional.silu(layer(hidden))
            as_map(hidden)
        return self.last(hidden)[..., None, None]


def untrained() -> Denoiser:
    """The network before it has learnt anything, frozen."""
    torch.manual_seed(0)
    schedule = NoiseSchedule.from_scheduler_config(SD_CONFIG)
    return Denoiser(network=PointNetwork().requires_grad_(False), schedule=schedule, prediction_type="v_prediction")


@cache
def teacher() -> Denoiser:
    """A network that a few seconds of v-prediction have taught the data; read it only."""
    denoiser = untrained()
    denoiser.network.requires_grad_(True)
    optimizer, generator = torch.optim.AdamW(denoiser.network.parameters(), lr=4e-3), torch.Generator().manual_seed(1)
    steps = 2500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        classes = torch.randint(CLASSES, (512,), generator=generator)
        x0, t = data(classes, generator), torch.randint(1000, (512,), generator=generator)
        classes[torch.rand(512, generator=generator) < 0.15] = CLASSES
        eps, (alpha, sigma) = torch.randn(x0.shape, generator=generator), denoiser.scales(t, x0)
        v = denoiser(alpha * x0 + sigma * eps, t, text_of(classes))
        loss = (v - (alpha * eps - sigma * x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    denoiser.network.requires_grad_(False)
    return denoiser


def distilled(method: str, steps: int, **fields: Any) -> Denoiser:
    """The student after `steps` updates of a method on the teacher, as the task and `fit` do them."""
    fit = {
        "steps": steps,
        "batch": 256,
        "learning_rate": 2e-3,
        "warmup": 20,
        "weight_decay": 0.0,
        **fields.pop("fit", {}),
    }
    recipe = distill_recipe({"method": method, "guidance": [GUIDANCE, GUIDANCE], "fit": fit, **fields})
    original, chosen = teacher(), method_named(method)
    torch.manual_seed(0)
    student = original.with_network(copy.deepcopy(original.network).requires_grad_(True))
    module = DistillationLoss(chosen, student, original, recipe)
    optimizers, size = build_optimizers(module, recipe.fit), recipe.fit.batch
    for step in range(steps):
        generator = seeded(0, 3, step)
        classes = torch.randint(CLASSES, (size,), generator=generator)
        shared, pictures = np.random.default_rng([0, step]), data(classes, generator)
        draws = Draws(
            step=step,
            size=size,
            latent_shape=(2, 1, 1),
            last_time=999,
            generator=generator,
            shared=shared,
            pictures=pictures,
        )
        uncond = text_of(torch.full((size,), CLASSES))
        loss = module(**chosen.draw(draws, recipe), text=text_of(classes), uncond=uncond)
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(step, recipe.fit)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        module.after_update(step)
    return student.with_network(student.network.eval())


def samples(
    denoiser: Denoiser, times: tuple[float, ...], *, sampler: Sampler, guidance: float = 1.0, count: int = 4000
) -> torch.Tensor:
    """x0 (CLASSES, count / CLASSES, 2) of all classes by a plan."""
    generator = torch.Generator().manual_seed(7)
    classes = torch.arange(count) % CLASSES
    noises = torch.randn(len(times) + 1, count, 2, 1, 1, generator=generator)
    text, uncond = text_of(classes), text_of(torch.full((count,), CLASSES))
    step = denoiser.guided(text, uncond, guidance) if guidance != 1 else lambda x, t: denoiser(x, t, text)
    table = table_of(denoiser, times, sampler=sampler)
    x0 = rollout(step, noises[0], table, len(table), noises=list(noises[1:]))
    return x0.view(-1, CLASSES, 2).transpose(0, 1)


@cache
def reference() -> torch.Tensor:
    """What the guided teacher draws in 50 steps."""
    return samples(teacher(), StepPlan.trailing(50).timesteps, sampler=DETERMINISTIC, guidance=GUIDANCE)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely & Rizzo 2013), the mean over classes; (CLASSES, N, 2) each."""
    between = 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()
    return float(between)
