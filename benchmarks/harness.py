"""One harness for every latency benchmark: candidates are checked, warmed up, timed in turn, and written as a record.

Rounds go A B C A B C ..., so that a machine that slows down slows all of them, and each ratio is that of one round.
NumPy and pydantic suffice; torch is imported when a CUDA clock is asked for.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ..core.errors import ArtifactError, ImagineFlashError, nearest
from ..folders.files import atomic_file
from .clocks import Clock, CpuClock
from .environment import Frozen, Git, Hardware, command_line, git_of, hardware_of, installed_versions, refuse_paths

FEWEST_ROUNDS = 5
LONG_ENOUGH, MOST_REPEATS = 200e-6, 2**14  # seconds that a timing should last; calls in one timing

Parameters = Annotated[dict[str, bool | int | float | str | tuple[int, ...]], AfterValidator(refuse_paths)]


class Check(BaseModel):
    """What was compared, by how much it differed, and how much it may; both in the unit that `what` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    what: str = Field(min_length=1)
    error: float
    tolerance: float = Field(ge=0, allow_inf_nan=False)

    @property
    def passed(self) -> bool:
        """Whether 0 <= error <= tolerance; NaN fails."""
        return 0 <= self.error <= self.tolerance


def compare(what: str, got: Any, reference: Any, tolerance: float) -> Check:
    """The largest absolute difference of two arrays, in float64 on the host; infinite where the shapes differ."""
    a, b = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    return Check(
        what=what, error=float(np.abs(a - b).max(initial=0)) if a.shape == b.shape else np.inf, tolerance=tolerance
    )


class Ratio(Frozen):
    """Quantiles over the rounds of baseline / candidate in the same round: above 1, the candidate is faster."""

    p5: float
    p50: float
    p95: float


class Timing(Frozen):
    """One candidate's microseconds per call over n rounds; a p99 of fewer than 100 rounds is close to the maximum."""

    name: str = Field(min_length=1)
    n: int = Field(ge=FEWEST_ROUNDS)
    mean_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    min_us: float
    ratio: Ratio


class Case(Frozen):
    """One row: plain parameters, and per candidate its timing, its passed check and perhaps further numbers.

    `repeats` calls make one timing, the same for every candidate, since quantiles of means over different numbers of
    calls don't compare.
    """

    case: Parameters
    baseline: str
    warm_up: int = Field(ge=1)
    repeats: int = Field(ge=1)
    timings: tuple[Timing, ...]
    checks: dict[str, Check]
    extra: dict[str, dict[str, float]] = Field(default_factory=dict)  # candidate -> name -> number, such as bytes moved

    @model_validator(mode="after")
    def _is_checked(self) -> Self:
        names = [timing.name for timing in self.timings]
        if len(set(names)) < len(names) or len({timing.n for timing in self.timings}) > 1:
            raise ValueError("the timings must have different names and the same n")
        if self.baseline not in names:
            raise ValueError(f"the baseline {self.baseline!r} has no timing")
        for name in names:
            if name not in self.checks or not self.checks[name].passed:
                raise ValueError(f"{name!r} has no passed check")
        if strangers := (self.checks.keys() | self.extra.keys()) - set(names):
            raise ValueError(f"checks or extra numbers of unknown candidates: {sorted(strangers)}")
        return self

    def __getitem__(self, candidate: str) -> Timing:
        """The timing of a candidate. Raises KeyError."""
        return {timing.name: timing for timing in self.timings}[candidate]

    def with_extra(self, extra: Mapping[str, Mapping[str, float]]) -> Case:
        """The same with further numbers, candidate -> name -> number. Raises ValueError for an unknown candidate."""
        merged = {c: {**self.extra.get(c, {}), **extra.get(c, {})} for c in {**self.extra, **extra}}
        return Case.model_validate({**self.model_dump(), "extra": merged})


class Record(Frozen):
    """A benchmark's result and all that it takes to judge or repeat it; `git` is None outside a checkout."""

    format: Literal["imagine-flash-benchmark"] = "imagine-flash-benchmark"
    format_version: Literal[1] = 1
    question: str
    date: AwareDatetime
    command_line: Annotated[str, AfterValidator(refuse_paths)]
    hardware: Hardware
    versions: dict[str, str]
    git: Git | None
    rows: tuple[Case, ...] = Field(min_length=1)


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


def new_record(
    question: str, rows: Sequence[Case], *, device: str = "cpu", argv: Sequence[str] | None = None
) -> Record:
    """The record of `rows`, with what this machine, environment and checkout are now; argv is by default sys.argv."""
    return Record(
        question=question,
        date=datetime.now(UTC).replace(microsecond=0),
        command_line=command_line(sys.argv if argv is None else argv),
        hardware=hardware_of(device),
        versions=installed_versions(),
        git=git_of(Path(__file__).parents[1]),
        rows=tuple(rows),
    )


def write_record(record: Record, path: str | Path) -> None:
    """Writes the record as JSON, whole or not at all. Raises ArtifactError."""
    with atomic_file(path) as temporary:
        temporary.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(path: str | Path) -> Record:
    """The record in a file. Raises ArtifactError, one line that names the file and the field."""
    try:
        return Record.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise ArtifactError(f"{path}: {_first_problem(error)}; measure again, or restore the file") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown field {field!r}{nearest(field, Record.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
