"""What fits into this machine's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..folders.cache import gib

BYTES_PER_PARAMETER = 7.2  # docs/results/export_sd_turbo.json: 8.7 GiB for 1.29 G, exporting and drawing at float32
HALF_BYTES_PER_PARAMETER = 2.0  # the weights of a network in bf16; what it computes comes on top
MINUTES_PER_BILLION = 6.3  # docs/results/export_sd_turbo.json: 8 minutes for 1.29 G on two cores
CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_needed(parameters: float) -> int:
    """Bytes that exporting and drawing may take with networks of so many numbers."""
    return int(parameters * BYTES_PER_PARAMETER)


def memory_of_this_machine() -> int | None:
    """Bytes of memory that this process may have: a container's limit, else all; None where the system does not say."""
    return min(_limits(), default=None)


def advice(parameters: float) -> str | None:
    """One line where an export may not fit into the memory, with what would; None where it does."""
    needed, here = memory_needed(parameters), memory_of_this_machine()
    if here is None or needed <= here:
        return None
    half = int(parameters * HALF_BYTES_PER_PARAMETER)
    way = (
        f"--backend torch --precision bf16 draws without an export and holds {gib(half)} of weights"
        if half < 0.8 * here
        else "see what fits: imagine-flash models"
    )
    return f"exporting {parameters / 1e9:.2f} G parameters may take {gib(needed)} of memory, and there are {gib(here)}; {way}"


def _limits() -> Iterator[int]:
    with suppress(AttributeError, ValueError, OSError):  # Windows has none
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # "max" is no number
            yield int(Path(file).read_text())
