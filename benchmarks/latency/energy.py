"""Energy through Zeus, which reads the processor's own meter (RAPL) and NVIDIA's."""

from __future__ import annotations

from collections.abc import Callable

NO_METER = "no meter"


def meter() -> Callable[[], float] | str:
    """What gives the joules that this machine's processors have taken so far; or why there is none."""
    try:
        from zeus.device import get_cpus  # pyright: ignore[reportMissingImports]
    except ImportError:
        return f'{NO_METER}: zeus is not installed: pip install "imagine-flash[energy]"'
    try:
        processors = get_cpus()
        if not len(processors):
            return f"{NO_METER}: this machine shows no RAPL counters"
        processors.get_total_energy_consumption(0)
    except Exception as error:  # its own errors share no base, and reading the counters may be forbidden
        return f"{NO_METER}: {(str(error).splitlines() or ['this machine shows no counters'])[0]}"

    def joules() -> float:
        read = [processors.get_total_energy_consumption(i) for i in range(len(processors))]
        return sum(one.cpu_mj + (one.dram_mj or 0.0) for one in read) / 1e3

    return joules
