"""What fits into this machine's memory."""

from __future__ import annotations

import os

from .catalogue import Entry

BYTES_PER_PARAMETER = 7.2  # docs/results/export_sd_turbo.json: 8.7 GiB for 1.29 G, exporting and drawing at float32


def memory_needed(entry: Entry) -> int | None:
    """Bytes that exporting and drawing may take, by the networks' parameters; None where those are not known."""
    return None if entry.parameters is None else int(entry.parameters * 1e9 * BYTES_PER_PARAMETER)


def memory_of_this_machine() -> int | None:
    """Bytes of memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has none
        return None
