"""The processes of a training, as accelerate and torch's launcher start them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from ..core.errors import ImagineFlashError
from .recipe import Fit
from .reproducible import Part, rows_of

_TIMEOUT = timedelta(hours=24)


def on_cpu() -> bool:
    """Whether it computes on the CPU: where there is nothing else, or ACCELERATE_USE_CPU says so."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def processes() -> Any:
    """accelerate's PartialState: this process among the others. It joins processes of a CPU only if told so at first. They
    wait for one another as long as one may encode pictures and texts for all; torch's own 10 minutes are too short for that.

    Raises ImagineFlashError where they were launched by a configuration of what would share weights out in another way."""
    for name in ("DeepSpeed", "FSDP", "Megatron-LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper().replace('-', '_')}"):
            raise ImagineFlashError(
                f"accelerate's configuration asks for {name}, which this training does not follow; launch without it, and "
                "share out by --shard: accelerate launch --num_processes N -m imagine_flash distill ... --shard"
            )
    return PartialState(cpu=on_cpu(), timeout=_TIMEOUT)


def begin_training(mixed_precision: str) -> None:
    """accelerate holds a process to the precision of its first training, and has no public way to begin another; what it knows
    of the other processes stays, and who joins them first says how long they wait."""
    processes()
    if AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state()


def refuse_different(accelerator: Accelerator, folder: Path, done: int, best: int) -> None:
    """ImagineFlashError, in every process, where they found different updates in the run's folder: the first one alone writes
    there, and each goes on from what it reads. All processes must call this."""
    told = torch.tensor([[done, best]], device=accelerator.device)
    found = accelerator.gather(told).tolist()  # type: ignore[union-attr]
    if any(row != found[0] for row in found):
        dones, bests = (", ".join(map(str, column)) for column in zip(*found, strict=True))
        raise ImagineFlashError(
            f"in {folder} the processes find different runs: {dones} updates, the best after {bests}; OUT.run must be one folder "
            "that all processes see, on every machine"
        )


def check_split(fit: Fit) -> None:
    """RecipeError where the batch cannot be shared out evenly over the processes and their parts."""
    rows_of(fit.batch, Part(count=fit.accumulate * processes().num_processes))


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
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
