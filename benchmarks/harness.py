"""One harness for every latency benchmark: candidates are checked, warmed up, timed in turn, and written as a record.

Rounds go A B C A B C ..., so that a machine that slows down slows all of them, and each ratio is that of one round.
NumPy and pydantic suffice; torch is imported when a CUDA clock is asked for.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ..core.errors import ImagineFlashError, nearest
from .clocks import Clock, CpuClock
from .schema import FEWEST_ROUNDS, Case, Check, Parameters, Ratio, Timing

LONG_ENOUGH, MOST_REPEATS = 200e-6, 2**14  # seconds that a timing should last; calls in one timing


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to do the work; `run` does it once, and what it returns is dropped."""

    name: str
    run: Callable[[], Any]


def measure(
    candidates: Sequence[Candidate],
    *,
    baseline: str,
    check: Callable[[Candidate], Check],
    case: Mapping[str, Any],
    warm_up: int = 10,
    n: int = 100,
    repeats: int | None = None,
    clock: Clock | None = None,
    rest: float = 0.0,
) -> Case:
    """Checks every candidate, warms up, then times n rounds of all in their order, the garbage collector paused.

    A timing is of `repeats` calls; by default as many, a power of two, as make the fastest candidate's timing last 200
    microseconds. The clock is the host's unless `clock_for` gave another. rest: seconds of sleep before each timing, for
    threads that the candidate before left spinning. Raises ImagineFlashError for a failed check.
    """
    names = [candidate.name for candidate in candidates]
    _refuse_settings(names, baseline, warm_up, n, repeats)
    parameters = TypeAdapter(Parameters).validate_python(dict(case))
    checks = {candidate.name: _refuse_wrong(candidate.name, check(candidate)) for candidate in candidates}
    clock = clock or CpuClock()
    with _garbage_collector_paused():
        for _ in range(warm_up):
            for candidate in candidates:
                _seconds(candidate, 1, clock)
        repeats = repeats or _enough_repeats(candidates, clock)
        rounds = [[_seconds(candidate, repeats, clock, rest) for candidate in candidates] for _ in range(n)]
    samples = dict(zip(names, np.array(rounds).T / repeats, strict=True))
    return case_of(samples, baseline=baseline, checks=checks, case=parameters, warm_up=warm_up, repeats=repeats)


def case_of(
    samples: Mapping[str, Sequence[float] | np.ndarray],
    *,
    baseline: str,
    checks: Mapping[str, Check],
    case: Mapping[str, Any],
    warm_up: int = 1,
    repeats: int = 1,
) -> Case:
    """A row of seconds per call that were taken elsewhere: candidate -> n of them, sample i of all in the same round.

    repeats: the calls that each sample is the mean of. Raises ImagineFlashError for a failed check, for fewer than five
    samples and for another number of them than the baseline's.
    """
    names, counts = list(samples), {len(own) for own in samples.values()}
    _refuse_settings(names, baseline, warm_up, min(counts, default=0), repeats)
    if len(counts) > 1:
        raise ImagineFlashError(f"every candidate needs the same number of samples, got {sorted(counts)}")
    for name in names:
        _refuse_wrong(name, checks.get(name))
    seconds = np.array([samples[name] for name in names]).T
    return Case(
        case=TypeAdapter(Parameters).validate_python(dict(case)),
        baseline=baseline,
        warm_up=warm_up,
        repeats=repeats,
        checks=dict(checks),
        timings=_timings(names, seconds, baseline, repeats),
    )


def _refuse_settings(names: list[str], baseline: str, warm_up: int, n: int, repeats: int | None) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ImagineFlashError(f"two candidates are called {twice[0]!r}; names must differ")
    if baseline not in names:
        raise ImagineFlashError(f"the baseline {baseline!r} is none of {names}{nearest(baseline, names)}")
    if warm_up < 1:
        raise ImagineFlashError(f"warm_up must be at least 1, got {warm_up}; first calls compile and allocate")
    if n < FEWEST_ROUNDS:
        raise ImagineFlashError(f"n must be at least {FEWEST_ROUNDS} rounds, got {n}; quantiles need them")
    if repeats is not None and repeats < 1:
        raise ImagineFlashError(f"repeats must be at least 1, got {repeats}; leave it out to have it chosen")


def _refuse_wrong(name: str, result: Any) -> Check:
    if not isinstance(result, Check):
        raise ImagineFlashError(f"{name!r} was not checked: check returned {type(result).__name__}, not a Check")
    if not result.passed:
        raise ImagineFlashError(
            f"{name!r} is wrong, so it was not timed: {result.what} differs by {result.error:.4g}, "
            f"allowed are {result.tolerance:.4g}"
        )
    return result


@contextmanager
def _garbage_collector_paused() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _seconds(candidate: Candidate, repeats: int, clock: Clock, rest: float = 0.0) -> float:
    """One timing, of `repeats` calls together; `clock.seconds` waits for the device."""
    run = candidate.run
    if rest:
        time.sleep(rest)
    start = clock.mark()
    for _ in range(repeats):
        run()
    return clock.seconds(start, clock.mark())


def _enough_repeats(candidates: Sequence[Candidate], clock: Clock) -> int:
    repeats = 1
    while repeats < MOST_REPEATS and min(_seconds(c, repeats, clock) for c in candidates) < LONG_ENOUGH:
        repeats *= 2
    return repeats


def _timings(names: Sequence[str], seconds: np.ndarray, baseline: str, repeats: int) -> tuple[Timing, ...]:
    """Of seconds per call (n, candidates), in the order of `names`."""
    microseconds = seconds * 1e6
    for name, shortest in zip(names, microseconds.min(0), strict=True):
        if shortest <= 0:
            raise ImagineFlashError(f"{name!r} took no time that the clock can see; give more than {repeats} repeats")
    base = microseconds[:, list(names).index(baseline)]
    return tuple(_timing(name, own, base) for name, own in zip(names, microseconds.T, strict=True))


def _timing(name: str, own: np.ndarray, base: np.ndarray) -> Timing:
    """Statistics to six significant digits of (n,) microseconds, and of the baseline's in the same rounds."""
    p50, p95, p99 = (_short(value) for value in np.quantile(own, (0.5, 0.95, 0.99)))
    low, middle, high = (_short(value) for value in np.quantile(base / own, (0.05, 0.5, 0.95)))
    return Timing(
        name=name,
        n=len(own),
        mean_us=_short(own.mean()),
        p50_us=p50,
        p95_us=p95,
        p99_us=p99,
        min_us=_short(own.min()),
        ratio=Ratio(p5=low, p50=middle, p95=high),
    )


def _short(value: float) -> float:
    return float(f"{value:.6g}")
