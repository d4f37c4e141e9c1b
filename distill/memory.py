"""What a distillation takes of memory, counted before it starts.

One update is played on fake tensors, which have shapes and types but no numbers: every storage that it would make is counted
while it lives. Weights, moments and averages are added from their sizes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..pipelines.loading import student_folder
from .models import load_teacher
from .optimizers import build_optimizers, moment_bytes
from .recipe import DistillRecipe
from .reproducible import Part
from .task import DistillTask


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device that trains, at the peak of an update.

    frozen: weights that do not train (teacher, text encoders, autoencoder). trained: weights that do, and their average.
    moments: the optimisers' state. update: the most that activations, gradients and the teacher's targets take together.
    """

    frozen: int
    trained: int
    moments: int
    update: int

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.moments + self.update


def plan_memory(
    teacher_folder: str | Path, recipe: DistillRecipe, *, processes: int = 1, device: str = "cuda"
) -> MemoryPlan:
    """The plan of a run of `recipe` on one of `processes` devices. The teacher is read into the host's memory for it.

    device: their kind, on which depends how attention is computed.
    """
    rows = max(1, recipe.fit.batch // (recipe.fit.accumulate * processes))
    recipe = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"batch": rows, "accumulate": 1})})
    teacher = load_teacher(student_folder(teacher_folder), recipe)
    pictures = [torch.zeros(rows, *teacher.latent_shape)]
    task = DistillTask(recipe, teacher, [""] * rows, "", pictures=pictures, device=device)
    stages = teacher.stages
    always = [stages.decoder, stages.image_encoder, *([] if recipe.cache_text else [stages.text_encoder])]
    parts = [task.module, task.teacher.denoiser.network, *always]
    trainable = [p for p in task.module.parameters() if p.requires_grad]
    trained = _bytes(trainable)
    return MemoryPlan(
        frozen=_bytes(tensor for part in parts for tensor in (*part.parameters(), *part.buffers())) - trained,
        trained=trained + _bytes(p for p in task.averaged.parameters() if p.requires_grad),
        moments=sum(map(moment_bytes, build_optimizers(task.module, recipe.fit))),
        update=peak_of_update(task),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def peak_of_update(task: DistillTask, *, fake: bool = True) -> int:
    """Bytes that forward and backward of the first update make, at most at one time, gradients included.

    fake: count without computing; otherwise the update is computed, which takes what it counts.
    """
    loss, batch, context = task.loss, task.batch(0, Part()), nullcontext()
    if fake:
        context = mode = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(mode):
            loss = copy.deepcopy(task.loss)
        batch = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, batch)
        for copied, real in _pairs(loss, task.loss):  # a fake copy forgets what trains
            copied.requires_grad_(real.requires_grad)
    half = task.recipe.fit.mixed_precision == "bf16"
    with context, LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            value = loss(**batch)
        value.backward()
    return live.peak


def _pairs(played: Any, real: Any) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
    """The weights of a loss's copy beside its own, those of the frozen denoisers among them."""
    yield from zip(played.parameters(), real.parameters(), strict=True)
    for copied, original in zip(played.denoisers, real.denoisers, strict=True):
        yield from zip(copied.network.parameters(), original.network.parameters(), strict=True)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside it that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
