"""One task's network, optimisers and EMA on accelerate: what an update is."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, DistributedType, send_to_device
from PIL import Image
from torch import nn

from ..core.errors import ImagineFlashError
from .best import Best
from .captured import CapturedLoss, CudaGraphs
from .checkpoint import TrainingState
from .optimizers import build_average, build_optimizers, clipped_together, rate_factor, special_parts
from .processes import begin_training, on_cpu
from .recipe import Fit
from .report import Report
from .reproducible import Part
from .sharding import agreed, average_rest, let_go, shard, whole

_MOST_SKIPPED = 50
_PLAIN = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU, DistributedType.MULTI_NPU)


class Task(Protocol):
    """What `fit` trains: `module(**batch)` is the loss, of which every trainable parameter belongs to `module`.

    name: of its files. fingerprint: of everything but the code that its weights depend on.
    """

    name: str
    fingerprint: str
    module: nn.Module

    @property
    def averaged(self) -> nn.Module:
        """The part whose weights are averaged over the updates, and left in it at the end."""
        return self.module

    @property
    def frozen(self) -> frozenset[str]:
        """Names of weights of `module` that no update changes: a checkpoint does without them."""
        return frozenset()

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The parts of `module` that may be shared out over processes; none: it cannot be."""
        return ()

    @property
    def resting(self) -> Sequence[nn.Module]:
        """Networks that `module` runs and no update changes, to be shared out as well; none is a part of it."""
        return ()

    @abstractmethod
    def batch(self, step: int, part: Part) -> dict[str, Any]:
        """The rows of a step's batch that belong to `part`: a pure function of its arguments."""

    def after_update(self, step: int) -> None:
        """Called once a step's optimisers have moved the weights."""

    def preview(self) -> Image.Image | None:
        """A picture of how it goes, drawn with the weights that `module` has now."""
        return None

    def validate(self) -> dict[str, float]:
        """Figures of the weights that `module` has now, the one that says which are best first: less is better."""
        return {}


class Run:
    """Network, optimiser and EMA of one task, prepared by accelerate."""

    def __init__(self, task: Task, fit: Fit, track: Sequence[str], folder: Path, shared: bool) -> None:
        self.task, self.fit, self.shared = task, fit, shared
        unused = bool(special_parts(task.module))  # not all learn at once
        buckets = DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)
        # autocast would keep the copies of weights that a rollout made without a graph, and they would get no gradient
        kinds = [buckets, AutocastKwargs(cache_enabled=False)]
        logs: dict[str, Any] = {"log_with": list(track), "project_dir": str(folder / "trackers")} if track else {}
        begin_training(fit.mixed_precision)
        how: Any = {"mixed_precision": fit.mixed_precision, "kwargs_handlers": kinds}
        self.accelerator = Accelerator(cpu=on_cpu(), **how, **logs)
        if self.accelerator.distributed_type not in (*_PLAIN, DistributedType.NO):
            raise ImagineFlashError(
                f"{self.accelerator.distributed_type} shards weights, which checkpoints here do not follow; "
                "launch plain processes, with --shard for memory"
            )
        task.module.to(self.accelerator.device)
        if shared:
            shard((*task.networks, *task.resting), self.accelerator.device)
        self.clipped = clipped_together(task.module)
        self.averaged = [p for p in task.averaged.parameters() if p.requires_grad]
        optimizers = build_optimizers(task.module, fit)
        on_gpu = self.accelerator.device.type == "cuda"
        self.ema = build_average(self.averaged, fit, on_gpu=on_gpu, shared=shared)
        self.ema.to(self.accelerator.device)
        self.wrapped = self.accelerator.prepare_model(task.module, evaluation_mode=shared)  # true: not wrapped in DDP
        self.optimizers = [self.accelerator.prepare_optimizer(each) for each in optimizers]
        self.state = TrainingState(
            module=task.module,
            ema=self.ema,
            optimizers=self.optimizers,
            task=task.name,
            fingerprint=task.fingerprint,
            frozen=task.frozen,
        )
        self.skipped, self.drawing = 0, threading.Lock()
        self.captured = self._captured() if fit.captured and on_gpu else None

    def _captured(self) -> CapturedLoss:
        if self.accelerator.num_processes > 1:
            raise ImagineFlashError("fit.captured needs one process; set it to false, or start one")
        learners = [p for p in self.task.module.parameters() if p.requires_grad]
        return CapturedLoss(self.wrapped, learners, CudaGraphs(self.drawing))

    def batches(self, step: int) -> list[dict[str, Any]]:
        """What this process computes in a step: one batch for each step of accumulation."""
        first, steps = self.accelerator.process_index * self.fit.accumulate, self.fit.accumulate
        count = self.accelerator.num_processes * steps
        with self.drawing:
            return [self.task.batch(step, Part(first + i, count)) for i in range(steps)]

    def update(self, batches: list[dict[str, Any]], step: int) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(step, self.fit)
        total = self._gradients(batches) if self.captured is None else self.captured.update(batches)
        if self.shared:
            for network in (self.task.module, *self.task.resting):
                let_go(network)
            average_rest(self.task.module, self.accelerator)
        self._step(step)
        moved = any(weight.grad is not None for weight in self.averaged)  # dmd2's in one update of several
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.task.after_update(step)
        if moved:
            self.ema.step(self.averaged)
        return total

    def _gradients(self, batches: list[dict[str, Any]]) -> float:
        """Leave the gradients of a step in the weights; returns its mean loss over all processes."""
        total = 0.0
        for i, batch in enumerate(batches):
            waits = self.accelerator.no_sync(self.wrapped) if i + 1 < len(batches) else nullcontext()
            with waits:
                loss = self.wrapped(**send_to_device(batch, self.accelerator.device)) / len(batches)
                self.accelerator.backward(loss)
            mean: Any = self.accelerator.reduce(loss.detach(), "mean")
            total += float(mean)
        return total

    def _step(self, step: int) -> None:
        """Clip and apply the gradients; one bad batch is passed over, a run that has diverged is not."""
        norms = [self.accelerator.clip_grad_norm_(parameters, self.fit.clip) for parameters in self.clipped]
        if all(norm is None or torch.isfinite(whole(norm)) for norm in norms):
            self.skipped = 0
            for optimizer in self.optimizers:
                optimizer.step()
            return
        self.skipped += 1
        if self.skipped >= _MOST_SKIPPED:
            raise ImagineFlashError(
                f"{self.task.name}: the gradient was not finite for {_MOST_SKIPPED} steps up to {step}; lower the learning rate"
            )

    @contextmanager
    def average(self) -> Iterator[None]:
        """The averaged weights stand in the module, which is not training."""
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        self.task.module.eval()
        try:
            yield
        finally:
            self.task.module.train()
            let_go(self.task.module)
            self.ema.restore(self.averaged)

    def agreed(self, value: float) -> float:
        """What all processes go by, where they must do the same thing."""
        return agreed(value, self.accelerator.device) if self.shared else value

    def look(self, step: int, report: Report, best: Best) -> None:
        """What the recipe asks for after `step` updates: a picture, figures."""
        previews, validations = self.fit.preview_every, self.fit.validate_every
        if (report.main or self.shared) and previews and step % previews == 0:
            with self.average(), self.accelerator.autocast():
                picture = self.task.preview()
            if picture is not None and report.main:
                report.picture(picture, step)
        if validations and step % validations == 0:
            with self.average(), self.accelerator.autocast(), torch.no_grad():
                figures = {name: self.agreed(value) for name, value in self.task.validate().items()}
                if figures and (self.fit.keep_best or self.fit.patience):
                    best.offer(figures, step, self.averaged, write=report.main)
            report.figures(figures, step)
