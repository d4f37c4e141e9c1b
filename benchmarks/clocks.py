"""What the harness measures with: the host's clock, or events of a CUDA device. torch is imported for the latter only."""

import re
import time
from typing import Any, Protocol

from ..core.errors import ImagineFlashError, missing_extra


class Clock(Protocol):
    """Marks moments; only `seconds` may wait."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, stop: Any) -> float: ...


class CpuClock:
    """The host's monotonic clock."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def seconds(self, start: int, stop: int) -> float:
        return (stop - start) / 1e9


class CudaClock:
    """Device events in the current stream. What the host launches more slowly than the device works is timed by its launches."""

    def __init__(self, device: str = "cuda") -> None:
        try:
            import torch
        except ImportError:
            raise missing_extra("torch", "train") from None
        if not torch.cuda.is_available():
            raise ImagineFlashError(f"no CUDA device for {device!r}; measure on the CPU, or check nvidia-smi")
        self._cuda, self._device = torch.cuda, torch.device(device)

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Waits for the device, the only place that does: each timing starts on an idle one, whatever ran before it."""
        self._cuda.synchronize(self._device)
        return start.elapsed_time(stop) / 1e3


def clock_for(device: str) -> Clock:
    """The clock of "cpu", "cuda" or "cuda:N". Raises ImagineFlashError."""
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ImagineFlashError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    return CpuClock() if device == "cpu" else CudaClock(device)
