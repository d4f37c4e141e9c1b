"""The one training loop of this project: every network here is fitted by `fit`, on accelerate.

A task gives its batch as a pure function of step and part, so that a resumed run repeats the run that was killed, bit for bit on
a CPU: the random state is never stored because it is never carried from one step to the next.
"""

from __future__ import annotations

import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, send_to_device
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.console import Console
from torch import nn

from ..core.errors import ImagineFlashError, Interrupted
from ..folders.files import atomic_file
from .checkpoint import TrainingState, load_checkpoint, save_checkpoint
from .optimizers import build_optimizers, clipped_together, rate_factor, special_parts
from .processes import on_cpu
from .progress import progress_bar
from .recipe import Fit
from .reproducible import Part

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

    @abstractmethod
    def batch(self, step: int, part: Part) -> dict[str, Any]:
        """The rows of a step's batch that belong to `part`: a pure function of its arguments."""

    def after_update(self, step: int) -> None:
        """Called once a step's optimisers have moved the weights."""

    def preview(self) -> Image.Image | None:
        """A picture of how it goes, drawn with the weights that `module` has now."""
        return None


def _single_threaded_worker() -> ThreadPoolExecutor:
    """A thread for the next batch that computes on one core: a second team of threads makes the training a fifth slower."""
    threads = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    worker.submit(int).result()
    torch.set_num_threads(threads)  # a part of the setting is the process's
    return worker


class _Run:
    """Network, optimiser and EMA of one task, prepared by accelerate."""

    def __init__(self, task: Task, fit: Fit) -> None:
        self.task, self.fit = task, fit
        parts = DistributedDataParallelKwargs(
            find_unused_parameters=bool(special_parts(task.module))
        )  # not all learn at once
        self.accelerator = Accelerator(cpu=on_cpu(), mixed_precision=fit.mixed_precision, kwargs_handlers=[parts])
        if self.accelerator.distributed_type not in (*_PLAIN, DistributedType.NO):
            raise ImagineFlashError(
                f"{self.accelerator.distributed_type} shards weights, which checkpoints here do not follow; "
                "launch plain processes (DDP), with 'lora', 'teacher_dtype' and 'gradient_checkpointing' for memory"
            )
        self.clipped = clipped_together(task.module)
        self.averaged = [p for p in task.averaged.parameters() if p.requires_grad]
        optimizers = build_optimizers(task.module, fit)
        task.module.to(self.accelerator.device)
        self.ema = EMAModel(self.averaged, decay=fit.ema_decay, use_ema_warmup=True, power=3 / 4)
        self.ema.to(self.accelerator.device)
        self.wrapped, *self.optimizers = self.accelerator.prepare(task.module, *optimizers)
        self.state = TrainingState(
            module=task.module,
            ema=self.ema,
            optimizers=self.optimizers,
            task=task.name,
            fingerprint=task.fingerprint,
            frozen=task.frozen,
        )
        self.skipped = 0

    def batches(self, step: int) -> list[dict[str, Any]]:
        """What this process computes in a step: one batch for each step of accumulation."""
        first, steps = self.accelerator.process_index * self.fit.accumulate, self.fit.accumulate
        count = self.accelerator.num_processes * steps
        return [self.task.batch(step, Part(first + i, count)) for i in range(steps)]

    def update(self, batches: list[dict[str, Any]], step: int) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(step, self.fit)
        total = 0.0
        for i, batch in enumerate(batches):
            waits = self.accelerator.no_sync(self.wrapped) if i + 1 < len(batches) else nullcontext()
            with waits:
                loss = self.wrapped(**send_to_device(batch, self.accelerator.device)) / len(batches)
                self.accelerator.backward(loss)
            mean: Any = self.accelerator.reduce(loss.detach(), "mean")
            total += float(mean)
        self._step(step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.task.after_update(step)
        self.ema.step(self.averaged)
        return total

    def _step(self, step: int) -> None:
        """Clip and apply the gradients; one bad batch is passed over, a run that has diverged is not."""
        norms = [self.accelerator.clip_grad_norm_(parameters, self.fit.clip) for parameters in self.clipped]
        if all(norm is None or torch.isfinite(norm) for norm in norms):
            self.skipped = 0
            for optimizer in self.optimizers:
                optimizer.step()
            return
        self.skipped += 1
        if self.skipped >= _MOST_SKIPPED:
            raise ImagineFlashError(
                f"{self.task.name}: the gradient was not finite for {_MOST_SKIPPED} steps up to {step}; lower the learning rate"
            )

    def preview(self, path: Path) -> None:
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        self.task.module.eval()
        try:
            picture = self.task.preview()
        finally:
            self.task.module.train()
            self.ema.restore(self.averaged)
        if picture is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                picture.save(temporary, format="PNG")


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C, so that the update that is under way is made whole and kept; the second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def asked(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def fit(task: Task, settings: Fit, folder: Path, console: Console | None = None) -> dict[str, float]:
    """Train `task.module` in place and leave its EMA weights in it. Resumes from `folder`/checkpoints where there is one.

    Args:
        task: the network, its batches and its preview.
        settings: steps, optimiser, EMA and intervals.
        console: of the progress bar; by default standard error.
        folder: the run's folder; `checkpoints/{task}.safetensors`, `previews/{task}-{step}.png` and `logs/{task}.csv` go there.
    Returns:
        {"steps", "seconds"} of all sittings, and "loss", the mean of the last hundred steps, where any were made.
    """
    run, checkpoint = _Run(task, settings), folder / "checkpoints" / f"{task.name}.safetensors"
    done, before = load_checkpoint(checkpoint, run.state) if checkpoint.exists() else (0, 0.0)
    last, losses = settings.steps, []
    main = run.accelerator.is_main_process
    log = folder / "logs" / f"{task.name}.csv"
    log.parent.mkdir(parents=True, exist_ok=True)
    task.module.train()
    started = saved = time.monotonic()
    progress = progress_bar(console, disable=not main)
    with _asked_to_stop() as stop, progress as bar, _single_threaded_worker() as ahead, log.open("a") as lines:
        shown = bar.add_task(task.name, total=last, completed=done)
        waiting = ahead.submit(run.batches, done)
        for step in range(done, last):
            batches, waiting = waiting.result(), ahead.submit(run.batches, step + 1)
            losses.append(run.update(batches, step))
            bar.update(shown, advance=1, description=f"{task.name} loss {sum(losses[-100:]) / len(losses[-100:]):.4f}")
            if not main:
                continue
            lines.write(f"{step},{losses[-1]!r},{time.monotonic() - started:.1f}\n")
            if stop.is_set() or time.monotonic() - saved > settings.checkpoint_minutes * 60 or step + 1 == last:
                lines.flush()
                spent = before + time.monotonic() - started
                save_checkpoint(checkpoint, run.state, step=step + 1, seconds=spent)
                saved = time.monotonic()
                if stop.is_set():
                    raise Interrupted(
                        f"interrupted after {step + 1} of {last} updates; the same command goes on from there"
                    )
            if settings.preview_every and (step + 1) % settings.preview_every == 0:
                run.preview(folder / "previews" / f"{task.name}-{step + 1:06d}.png")
    run.ema.copy_to(run.averaged)
    task.module.eval()
    recent = {"loss": sum(losses[-100:]) / len(losses[-100:])} if losses else {}
    return {"steps": float(last), "seconds": round(before + time.monotonic() - started, 1), **recent}
