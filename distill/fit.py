"""The one training loop of this project: every network here is fitted by `fit`, on accelerate.

A task gives its batch as a pure function of (step, rank), so that a resumed run repeats the run that was killed, bit for bit on
a CPU: the random state is never stored because it is never carried from one step to the next.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from PIL import Image
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from ..core.errors import ImagineFlashError, Interrupted
from ..folders.files import atomic_file
from .checkpoint import TrainingState, load_checkpoint, save_checkpoint
from .muon import Muon
from .recipe import Fit

_MOST_SKIPPED = 50
_EDGES = re.compile(r"(^|\.)conv_(in|out)\.")  # the first and last layer, whose rows are no features
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


class Task(Protocol):
    """What `fit` trains: `module(**batch)` is the loss, of which every trainable parameter belongs to `module`."""

    name: str
    identity: str  # of everything but the code that its weights depend on: see `identify`
    module: nn.Module

    def batch(self, step: int, rank: int) -> dict[str, Any]: ...

    def preview(self) -> Image.Image | None:
        """A picture of how it goes, drawn with the weights that `module` has now."""
        ...


def rate_factor(step: int, fit: Fit) -> float:
    """The share of the recipe's rates at a step: linear warm-up, then constant, linear to 0, or half a cosine down to 2 %."""
    warm = min(1.0, (step + 1) / max(1, fit.warmup))
    if fit.schedule == "constant":
        return warm
    if fit.schedule == "linear":
        return warm * (1 - step / fit.steps)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / fit.steps)))


def build_optimizers(module: nn.Module, fit: Fit) -> list[torch.optim.Optimizer]:
    """AdamW for every trainable weight; or Muon for the matrices inside the network and AdamW for the rest.

    A module's `parameter_groups` name parts that AdamW trains at a rate and with betas of their own.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    special = module.parameter_groups() if hasattr(module, "parameter_groups") else {}  # type: ignore[operator]
    groups = [{"params": list(part.parameters()), "lr": lr, "betas": betas} for part, lr, betas in special.values()]
    common = {name: p for name, p in trainable.items() if not name.startswith(tuple(f"{part}." for part in special))}
    inner: set[str] = set()
    if fit.optimizer == "muon":
        tables = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
        inner = {name for name, p in common.items() if p.ndim >= 2 and name not in tables and not _EDGES.search(name)}
    groups.insert(0, {"params": [p for name, p in common.items() if name not in inner]})
    adamw = torch.optim.AdamW(
        groups, lr=fit.learning_rate, betas=fit.betas, weight_decay=fit.weight_decay, eps=1e-8, fused=True
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if inner:
        optimizers.append(Muon([common[name] for name in sorted(inner)], lr=fit.muon_rate))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _passing(recipe: BaseModel) -> set[str]:
    """What a run may change and go on: intervals, and the length where no rate depends on it."""
    open_ended = getattr(getattr(recipe, "fit", recipe), "schedule", "") == "constant"
    return {"checkpoint_minutes", "preview_every"} | ({"steps"} if open_ended else set())


def identify(*parts: Any) -> str:
    """A SHA-256 of recipes (without what only says how long and how often) and other values."""
    plain = [p.model_dump(mode="json", exclude={"fit": _passing(p)}) if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def seeded(seed: int, *position: int) -> torch.Generator:
    """A CPU generator that depends on the seed and on every number of the position (step, rank, ...)."""
    state = 0x9E3779B97F4A7C15 ^ seed
    for number in position:
        state = (state * 6364136223846793005 + number * 2 + 1) % 2**63
    return torch.Generator().manual_seed(state)


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
        self.accelerator = Accelerator(mixed_precision=fit.mixed_precision)
        self.parameters = [p for p in task.module.parameters() if p.requires_grad]
        optimizers = build_optimizers(task.module, fit)
        task.module.to(self.accelerator.device)
        self.ema = EMAModel(self.parameters, decay=fit.ema_decay, use_ema_warmup=True, power=3 / 4)
        self.ema.to(self.accelerator.device)
        self.wrapped, *self.optimizers = self.accelerator.prepare(task.module, *optimizers)

        self.state = TrainingState(
            module=task.module, ema=self.ema, optimizers=self.optimizers, task=task.name, identity=task.identity
        )
        self.skipped = 0

    def update(self, batch: dict[str, Any], step: int) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(step, self.fit)
        moved = send_to_device(batch, self.accelerator.device)
        loss = self.wrapped(**moved)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.fit.clip)
        if norm is None or torch.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            self.skipped = 0
        else:  # one bad batch is passed over; a run that has diverged is not
            self.skipped += 1
            if self.skipped >= _MOST_SKIPPED:
                raise ImagineFlashError(
                    f"{self.task.name}: the gradient was not finite for {_MOST_SKIPPED} steps up to {step}; lower the learning rate"
                )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)
        return float(loss.detach())

    def preview(self, path: Path) -> None:
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.task.module.eval()
        try:
            picture = self.task.preview()
        finally:
            self.task.module.train()
            self.ema.restore(self.parameters)
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


def fit(task: Task, settings: Fit, folder: Path) -> dict[str, float]:
    """Train `task.module` in place and leave its EMA weights in it. Resumes from `folder`/checkpoints where there is one.

    Args:
        task: the network, its batches and its preview.
        settings: steps, optimiser, EMA and intervals.
        folder: the run's folder; `checkpoints/{task}.safetensors`, `previews/{task}-{step}.png` and `logs/{task}.csv` go there.
    Returns:
        {"steps", "seconds"} of all sittings, and "loss", the mean of the last hundred steps, where any were made.
    """
    run, checkpoint = _Run(task, settings), folder / "checkpoints" / f"{task.name}.safetensors"
    done, before = load_checkpoint(checkpoint, run.state) if checkpoint.exists() else (0, 0.0)
    last, losses = settings.steps, []
    rank, main = run.accelerator.process_index, run.accelerator.is_main_process
    log = folder / "logs" / f"{task.name}.csv"
    log.parent.mkdir(parents=True, exist_ok=True)
    task.module.train()
    started = saved = time.monotonic()
    progress = Progress(*_COLUMNS, console=Console(stderr=True), disable=not main)
    with _asked_to_stop() as stop, progress as bar, _single_threaded_worker() as ahead, log.open("a") as lines:
        shown = bar.add_task(task.name, total=last, completed=done)
        waiting = ahead.submit(task.batch, done, rank)
        for step in range(done, last):
            batch, waiting = waiting.result(), ahead.submit(task.batch, step + 1, rank)
            losses.append(run.update(batch, step))
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
    run.ema.copy_to(run.parameters)
    task.module.eval()
    recent = {"loss": sum(losses[-100:]) / len(losses[-100:])} if losses else {}
    return {"steps": float(last), "seconds": round(before + time.monotonic() - started, 1), **recent}
