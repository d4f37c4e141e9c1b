"""What a method of distillation is: a recipe, what it draws at random, and a loss that is a pure function of its arguments.

The training knows no method by name. A file in this folder that defines METHOD is one; `method:` in a recipe names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...core.errors import RecipeError
from ...core.sampler import DETERMINISTIC, Sampler
from ..models import Denoiser
from ..recipe import DistillRecipe

Batch = dict[str, Any]
RENOISE = Sampler(kind="renoise")
Companions = Mapping[str, nn.Module]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one update, the same on every machine, after a resume and for any number of processes.

    size: rows of the whole batch. generator: for what each row has of its own. shared: for what all rows have in common.
    pictures: clean latents (size, C, h, w) of data with the batch's prompts, for the methods that ask for them.
    """

    step: int
    size: int
    latent_shape: tuple[int, ...]
    last_time: int
    generator: torch.Generator
    shared: np.random.Generator
    pictures: torch.Tensor | None = None

    def noise(self) -> torch.Tensor:
        """(size, C, h, w), unit Gaussian."""
        return torch.randn((self.size, *self.latent_shape), generator=self.generator)

    def uniform(self, low: float, high: float) -> torch.Tensor:
        """(size,) between low and high."""
        return low + (high - low) * torch.rand(self.size, generator=self.generator)

    def times(self, low: float, high: float) -> torch.Tensor:
        """(size,) whole timestep indices from low to high."""
        return self.uniform(low, high).long()

    def data(self) -> torch.Tensor:
        """The pictures in float32."""
        assert self.pictures is not None, "this method asks for pictures"
        return self.pictures.float()

    def step_of_plan(self, recipe: DistillRecipe) -> tuple[int, int]:
        """(n, i): a plan of n steps, by the recipe's weights, and one of its positions; the same for all rows."""
        weights = recipe.plan_weights
        plan = int(self.shared.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
        return plan, int(self.shared.integers(plan))


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A network beside student and teacher: a discriminator, a fake score, an averaged student.

    learning_rate: None where no optimiser trains it.
    """

    network: nn.Module
    learning_rate: float | None = None
    betas: tuple[float, float] = (0.0, 0.99)


def frozen_copy(denoiser: Denoiser) -> Companion:
    """Its network as it is now, which no gradient and no optimiser changes."""
    return Companion(network=copy.deepcopy(denoiser.network).requires_grad_(False))


@dataclass(frozen=True, kw_only=True)
class Method:
    """One file of this folder.

    recipe: the fields of its YAML. draw(draws, recipe) -> batch: all that is random. loss(student, teacher, batch, recipe,
    companions) -> a scalar, with batch as drawn and two more entries: "text" and "uncond", the conditions of the prompts and
    of no prompt. check(teacher, recipe): raises RecipeError for a teacher that this recipe cannot be used with.
    companions(student, teacher, recipe): further networks by name. after_update(student, companions, recipe,
    step): what moves without a gradient. pictures(recipe): whether it needs data. sampler: what its students draw with.
    """

    recipe: type[DistillRecipe]
    draw: Callable[[Draws, Any], Batch]
    loss: Callable[[Denoiser, Denoiser, Batch, Any, Companions], torch.Tensor]
    check: Callable[[Denoiser, Any], None] = lambda teacher, recipe: None
    companions: Callable[[Denoiser, Denoiser, Any], dict[str, Companion]] = lambda student, teacher, recipe: {}
    after_update: Callable[[Denoiser, Companions, Any, int], None] = lambda student, companions, recipe, step: None
    pictures: Callable[[Any], bool] = lambda recipe: False
    sampler: Sampler = DETERMINISTIC


class DistillationLoss(nn.Module):
    """The loss of a method as a module: student and companions are its parts, the frozen teacher is not."""

    def __init__(self, method: Method, student: Denoiser, teacher: Denoiser, recipe: DistillRecipe) -> None:
        super().__init__()
        self.student = student.network
        self._method, self._recipe, self.denoisers = method, recipe, (student, teacher)
        method.check(teacher, recipe)
        self._companions = method.companions(student, teacher, recipe)
        for name, companion in self._companions.items():
            self.add_module(name, companion.network)
        if recipe.lora is not None and len(self.networks) > 1:
            name = next(n for n, companion in self._companions.items() if companion.network is self.networks[1])
            raise RecipeError(
                f"the method {recipe.method} keeps a second network ({name}), so 'lora' saves nothing; "
                "leave it out, or take imagine_flash, add, flash, or lcm with target_decay: 0"
            )

    @property
    def companions(self) -> Companions:
        return {name: companion.network for name, companion in self._companions.items()}

    @property
    def networks(self) -> list[nn.Module]:
        """The student, and companions of its form: a fake score, the student from before, an average of it."""
        kinds = tuple(type(denoiser.network) for denoiser in self.denoisers)
        return [self.student, *(network for network in self.companions.values() if isinstance(network, kinds))]

    def forward(self, **batch: Any) -> torch.Tensor:
        return self._method.loss(*self.denoisers, batch, self._recipe, self.companions)

    def after_update(self, step: int) -> None:
        """Once a step's optimisers have moved the weights."""
        self._method.after_update(self.denoisers[0], self.companions, self._recipe, step)

    def parameter_groups(self) -> dict[str, tuple[nn.Module, float, tuple[float, float]]]:
        """Parts with a learning rate and betas of their own; the rest goes by the recipe's `fit`."""
        parts = self._companions.items()
        return {name: (c.network, c.learning_rate, c.betas) for name, c in parts if c.learning_rate is not None}
