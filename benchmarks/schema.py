"""What a benchmark's record holds, and reading and writing it: every number with its check, its baseline and its provenance."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core.errors import ArtifactError, nearest
from ..folders.files import atomic_file
from .environment import (
    Frozen,
    Git,
    Hardware,
    command_line,
    git_of,
    hardware_of,
    installed_versions,
    refuse_paths,
    without_paths,
)

FEWEST_ROUNDS = 5


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
    left_out: Annotated[dict[str, str], AfterValidator(refuse_paths)] = Field(default_factory=dict)  # what -> why


def new_record(
    question: str,
    rows: Sequence[Case],
    *,
    device: str = "cpu",
    argv: Sequence[str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Record:
    """The record of `rows`, with what this machine, environment and checkout are now; argv is by default sys.argv. left_out:
    what could not be measured, and why; paths in it are cut to their base names."""
    return Record(
        question=question,
        date=datetime.now(UTC).replace(microsecond=0),
        command_line=command_line(sys.argv if argv is None else argv),
        hardware=hardware_of(device),
        versions=installed_versions(),
        git=git_of(Path(__file__).parents[1]),
        rows=tuple(rows),
        left_out={name: without_paths(why) for name, why in (left_out or {}).items()},
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
