"""Updates as CUDA graphs: a small network's update costs a GPU less time than the host takes to launch it, operation by operation.

What an update computes depends on the plain values of its batch (which plan, which step, who learns), so each kind of batch has
a graph of its own: the first of a kind is computed as usual, the second is recorded, and all later ones replay that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..core.errors import ImagineFlashError

Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], object], torch.Tensor]]


class CudaGraphs:
    """Records work that a GPU then repeats by one launch; all records of one share the memory between their operations."""

    def __init__(self, others: threading.Lock) -> None:
        """others: held by other threads while they use the device."""
        self.pool, self.others = torch.cuda.graph_pool_handle(), others

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """What repeats `work`, and where its result then stands."""
        graph = torch.cuda.CUDAGraph()
        with self.others, torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


@dataclass
class _Kind:
    """Updates that compute the same thing: who learns in them and, once recorded, their inputs, replay and loss."""

    learners: list[nn.Parameter]
    inputs: list[torch.Tensor]
    replay: Callable[[], object] | None = None
    loss: torch.Tensor | None = None


class CapturedLoss:
    """A module's loss and its gradients, by replay; a learner's `.grad` is None where nothing of an update concerned it."""

    def __init__(self, module: Callable[..., torch.Tensor], learners: Iterable[nn.Parameter], record: Record) -> None:
        """module(**batch) is the loss, and draws no random numbers. record: CudaGraphs(), or what stands for it."""
        self.module, self.record = module, record
        self.gradients = {p: torch.zeros_like(p) for p in learners}
        self.kinds: dict[Any, _Kind] = {}

    def update(self, batches: Sequence[dict[str, Any]]) -> float:
        """Leaves the mean gradient of the batches in `.grad`; returns their mean loss."""
        torch._foreach_zero_(list(self.gradients.values()))
        for parameter in self.gradients:
            parameter.grad = None
        device = next(iter(self.gradients)).device
        on_device: list[Any] = [send_to_device(batch, device) for batch in batches]
        total = sum(float(self._add(batch)) for batch in on_device)
        if len(batches) > 1:
            torch._foreach_div_([p.grad for p in self.gradients if p.grad is not None], len(batches))
        return total / len(batches)

    def _add(self, batch: dict[str, Any]) -> torch.Tensor:
        """Add the gradients of a batch to `.grad`; returns its loss, valid until the next call."""
        values: list[Any] = []
        key = _kind(batch, values)
        kind = self.kinds.get(key)
        if kind is None:
            loss, kind = self._first(batch)
            self.kinds[key] = kind
        else:
            if kind.replay is None:
                self._capture(kind, batch, values)
            for place, value in zip(kind.inputs, values, strict=True):
                place.copy_(value, non_blocking=True) if isinstance(value, torch.Tensor) else place.fill_(value)
            self._attach(kind)
            assert kind.replay is not None and kind.loss is not None
            kind.replay()
            loss = kind.loss
        self._attach(kind)
        return loss

    def _attach(self, kind: _Kind) -> None:
        """Backward adds to what is there, in place."""
        for parameter in kind.learners:
            parameter.grad = self.gradients[parameter]

    def _first(self, batch: dict[str, Any]) -> tuple[torch.Tensor, _Kind]:
        kept = {p: p.grad for p in self.gradients}
        for parameter in kept:
            parameter.grad = None
        loss = self.module(**batch)
        loss.backward()
        learners = [p for p in self.gradients if p.grad is not None]
        for parameter in learners:
            assert parameter.grad is not None
            self.gradients[parameter] += parameter.grad
        for parameter, before in kept.items():
            parameter.grad = before
        return loss.detach(), _Kind(learners, [])

    def _capture(self, kind: _Kind, batch: dict[str, Any], values: list[Any]) -> None:
        device = next(iter(self.gradients)).device
        kind.inputs = [
            v.clone() if isinstance(v, torch.Tensor) else torch.full((), v, dtype=torch.float32, device=device)
            for v in values
        ]
        inputs = _refilled(batch, iter(kind.inputs))
        self._attach(kind)

        def work() -> torch.Tensor:
            loss = self.module(**inputs)
            loss.backward()
            return loss.detach()

        try:
            kind.replay, kind.loss = self.record(work)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ImagineFlashError(
                f"this update cannot be captured in a CUDA graph ({reason}); set fit.captured: false"
            ) from None


def _kind(value: Any, values: list[Any]) -> Any:
    """What batches of one kind have in common, hashable; what they differ in goes to `values`: tensors, and numbers but 0."""
    if isinstance(value, torch.Tensor):
        values.append(value)
        return (tuple(value.shape), value.dtype)
    if isinstance(value, float) and value:
        values.append(value)
        return float
    if isinstance(value, dict):
        return tuple((name, _kind(each, values)) for name, each in value.items())
    if isinstance(value, tuple):
        return tuple(_kind(each, values) for each in value)
    return value


def _refilled(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The batch with tensors of its own in the places of `values`."""
    if isinstance(value, torch.Tensor) or (isinstance(value, float) and value):
        return next(tensors)
    if isinstance(value, dict):
        return {name: _refilled(each, tensors) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_refilled(each, tensors) for each in value)
    return value
