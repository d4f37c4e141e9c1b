"""Quality against time: what distillation buys, as one picture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ImagineFlashError, missing_extra
from ...folders.files import atomic_file
from ..schema import Record

OURS, DIFFUSERS = "imagine-flash", "diffusers"
GUIDED = re.compile(r", (\d+) guided steps$")  # what `bench latency --teacher` adds to a name
Lines = dict[str, list[tuple[int, float, float]]]  # name -> (steps, milliseconds, FD)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of one picture (p50), by the number of steps. Where several ways were measured: of the fastest."""

    teacher: dict[int, float]  # guided, in diffusers
    student: dict[int, float]  # in diffusers
    engine: dict[int, float]  # the student in this project's engine


def times_of(latency: Record) -> Times:
    """What a record of `bench latency --against diffusers --teacher ...` says of single pictures."""
    times = Times(teacher={}, student={}, engine={})
    for row in latency.rows:
        if row.case.get("batch") != 1 or not isinstance(steps := row.case.get("steps"), int):
            continue
        for timing in row.timings:
            guided = GUIDED.search(timing.name)
            if timing.name.startswith(OURS):
                place = times.engine, steps
            elif timing.name.startswith(DIFFUSERS):
                place = (times.teacher, int(guided[1])) if guided else (times.student, steps)
            else:
                continue
            of, number = place
            of[number] = min(of.get(number, float("inf")), timing.p50_us / 1e3)
    return times


def points(record: dict[str, Any], times: Times) -> Lines:
    """Line -> (steps, milliseconds, FD) of the rows whose time is known; a student's row stands in two lines."""
    lines: Lines = {}
    for row in record["rows"]:
        method, calls, distance = row["method"], row["network_calls"], row["fd_judge_unbiased"]
        if method.startswith("teacher"):
            solver = method.split(", ")[2] if method.count(", ") > 1 else "DDIM"
            places = [(f"teacher, {solver}, in diffusers", times.teacher, calls // 2)]
        elif calls and "no noise correction" not in method:
            name = method.rpartition(": ")[0] or "student"
            places = [(f"{name}, in diffusers", times.student, calls), (name, times.engine, calls)]
        else:
            continue
        for line, known, steps in places:
            if steps in known:
                lines.setdefault(line, []).append((steps, known[steps], distance))
    return lines


def against_time(record: dict[str, Any], latency: Record) -> Lines:
    """`points` of a record of times. Raises ImagineFlashError where it has none of the rows' steps."""
    if not (lines := points(record, times_of(latency))):
        raise ImagineFlashError(
            "the record of times has no row of these steps; measure with bench latency --against diffusers --teacher 3,25"
        )
    return lines


def plot_against_time(lines: Lines, path: Path) -> None:
    """Write a PNG: FD (judge) of each row over the time of one picture. Raises MissingExtraError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "bench") from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, places), marker in zip(lines.items(), "osD^vP*X" * len(lines), strict=False):
        steps, milliseconds, distances = zip(*sorted(places), strict=True)
        hollow: Any = {"markerfacecolor": "none"} if name.endswith("in diffusers") else {}
        axes.plot(milliseconds, distances, marker=marker, linewidth=0.8, label=name, **hollow)
        for label, time, distance in zip(steps, milliseconds, distances, strict=True):
            axes.annotate(str(label), (time, distance), textcoords="offset points", xytext=(5, 4), fontsize="small")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("milliseconds of one picture, p50")
    axes.set_ylabel("FD (judge)")
    axes.grid(alpha=0.3, which="both")
    figure.suptitle("Quality against time; beside each point its steps")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
