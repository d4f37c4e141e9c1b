"""What an update of a method costs: in evaluations of the teacher's network, so that methods can be given equal budgets."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...distill.models import Model
from ...distill.recipe import DistillRecipe
from ...distill.reproducible import Part
from ...distill.task import DistillTask

SAMPLED = (
    40  # updates, spread over a training: phases, plans and steps are drawn, and dmd2's student learns in one of five
)
_ROWS = 2


def evaluations_per_row(recipe: DistillRecipe, teacher: Model) -> float:
    """Operations of an update (forward, backward, all networks) over those of one forward pass of the teacher, per row."""
    fit = recipe.fit.model_copy(update={"steps": SAMPLED, "batch": _ROWS, "accumulate": 1})
    recipe = recipe.model_copy(update={"fit": fit})
    pictures = torch.randn(_ROWS, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    task = DistillTask(recipe, teacher, [""] * _ROWS, "", pictures=[pictures])
    spent = 0
    for step in range(SAMPLED):
        with Operations() as counted:
            task.loss(**task.batch(step, Part())).backward()
        spent += counted.total
    return spent / SAMPLED / _ROWS / _forward(task)


def updates_within(budget: float, recipe: DistillRecipe, teacher: Model) -> DistillRecipe:
    """The recipe with as many updates as `budget` evaluations of the teacher's network on one latent pay for, at least one."""
    updates = max(1, round(budget / (recipe.fit.batch * evaluations_per_row(recipe, teacher))))
    return recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"steps": updates})})


def _forward(task: DistillTask) -> float:
    """Operations of one forward pass of the teacher on one row."""
    latents, text = torch.zeros(_ROWS, *task.teacher.latent_shape), task.text[torch.arange(_ROWS)]
    with torch.no_grad(), Operations() as counted:
        task.teacher.denoiser(latents, task.teacher.denoiser.last_time, text)
    return counted.total / _ROWS


class Operations(TorchDispatchMode):
    """Counts the operations of matrices, convolutions and attention; torch's own FlopCounterMode fails in `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result
