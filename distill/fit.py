"""The one training loop of this project: every network here is fitted by `fit`, on accelerate.

A task gives its batch as a pure function of step and part, so that a resumed run repeats the run that was killed, bit for bit on
a CPU: the random state is never stored because it is never carried from one step to the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from ..core.errors import Interrupted
from .best import Best
from .checkpoint import load_checkpoint, save_checkpoint
from .processes import asked_to_stop, refuse_different
from .recipe import Fit
from .report import Report, check_trackers, start_trackers
from .run import Run, Task
from .sharding import gather
from .tensors import remove_unfinished

_LEAST_PAUSE = 20  # between two checkpoints, in the time that the first one took


def fit(
    task: Task,
    settings: Fit,
    folder: Path,
    console: Console | None = None,
    *,
    track: Sequence[str] = (),
    shared: bool = False,
) -> dict[str, float]:
    """Train `task.module` in place and leave its EMA weights in it. Resumes from `folder`/checkpoints where there is one.

    Args:
        task: the network, its batches and its preview.
        settings: steps, optimiser, EMA and intervals.
        console: of the progress bar; by default standard error.
        folder: the run's folder; `checkpoints/{task}.safetensors`, `previews/{task}-{step}.png` and `logs/{task}.csv` go there.
        track: trackers by accelerate's names; local ones write to `trackers/`.
        shared: whether the task's networks are shared out over the processes while they train.
    Returns:
        {"steps", "seconds"} of all sittings, "loss", the mean of the last hundred steps, where any were made, and "best_step"
        and "best", the least figure, where the recipe keeps the best.
    """
    check_trackers(track)
    run, checkpoint = Run(task, settings, track, folder, shared), folder / "checkpoints" / f"{task.name}.safetensors"
    done, before = load_checkpoint(checkpoint, run.state) if checkpoint.exists() else (0, 0.0)
    best = Best(checkpoint.with_name(f"{task.name}-best.safetensors"), task.fingerprint, settings.patience)
    refuse_different(run.accelerator, folder, done, best.step)
    if run.accelerator.is_main_process:
        remove_unfinished(folder)
    trackers = start_trackers(run.accelerator, task.name, settings) if track else []
    report = Report(task.name, folder, trackers, console, main=run.accelerator.is_main_process)
    task.module.train()
    started = time.monotonic()
    with asked_to_stop() as stop, report, _single_threaded_worker() as ahead:
        report.begin(settings.steps, done)
        sitting = _Sitting(run, report, best, checkpoint, before - started)
        done = sitting.train(done, stop, ahead)
    run.ema.copy_to(run.averaged)
    if settings.keep_best:
        run.accelerator.wait_for_everyone()
        best.restore(run.averaged)
    if shared:
        gather(task.module)
    task.module.eval()
    figures = {"steps": float(done), "seconds": round(before + time.monotonic() - started, 1)}
    figures |= {} if report.recent is None else {"loss": report.recent}
    return figures | ({"best_step": float(best.step), "best": best.value} if best.step else {})


class _Sitting(NamedTuple):
    """The updates of one sitting; since: what to add to the clock for the seconds of all of them."""

    run: Run
    report: Report
    best: Best
    checkpoint: Path
    since: float

    def train(self, done: int, stop: threading.Event, ahead: ThreadPoolExecutor) -> int:
        """Every update from `done` on, with its checkpoints; returns how many there are now. Raises Interrupted after Ctrl-C."""
        last, saved, waiting = self.run.fit.steps, time.monotonic(), ahead.submit(self.run.batches, done)
        pause = 60 * self.run.fit.checkpoint_minutes
        for step in range(done, last):
            if self.best.exhausted(step):
                return step
            batches, waiting = waiting.result(), ahead.submit(self.run.batches, step + 1)
            self.report.update(step, self.run.update(batches, step), time.monotonic() + self.since)
            self.run.look(step + 1, self.report, self.best)
            ends = step + 1 == last or stop.is_set() or self.best.exhausted(step + 1)
            due = self.run.agreed(ends or time.monotonic() - saved > pause)
            if due and (self.report.main or self.run.shared):
                pause, saved = self.save(step + 1), time.monotonic()
            if self.report.main and stop.is_set():
                raise Interrupted(
                    f"interrupted after {step + 1} of {last} updates; the same command goes on from there"
                )
        return max(done, last)

    def save(self, step: int) -> float:
        """A checkpoint after `step` updates; returns the seconds until the next: large ones are rarer than the recipe asks."""
        self.report.flush()
        began = time.monotonic()
        save_checkpoint(self.checkpoint, self.run.state, step=step, seconds=began + self.since, write=self.report.main)
        return max(60 * self.run.fit.checkpoint_minutes, _LEAST_PAUSE * (time.monotonic() - began))


def _single_threaded_worker() -> ThreadPoolExecutor:
    """A thread for the next batch that computes on one core: a second team of threads makes the training a fifth slower."""
    threads = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    worker.submit(int).result()
    torch.set_num_threads(threads)  # a part of the setting is the process's
    return worker
