"""Tables and plots of benchmark records, and the tables inside the docs, which are always generated."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..core.errors import ImagineFlashError, missing_extra
from ..folders.files import atomic_file
from .schema import Case, Record, Timing, write_record

END = "<!-- /bench -->"
FEWEST_FOR_P99 = 100  # rounds; of fewer it is nearly the slowest
FURTHER, MOST_COLUMNS = "further numbers", 5  # of numbers that cases have of their own: more share one column
TEXT = ("case", "candidate", FURTHER)
NAMES = ("kernel", "what", "backend", "precision", "route")  # parameters whose values say of what they are


def as_markdown(record: Record) -> str:
    """A table of one row per case and candidate; times in µs, or in ms if every median is at least one. Below it what could
    not be measured."""
    table = markdown_table(headings_of(record), table_rows(record), TEXT)
    left_out = [f"- Not measured: {name}: {why}" for name, why in record.left_out.items()]
    return "\n".join([table, *([""] if left_out else []), *left_out])


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str]) -> str:
    """GitHub's Markdown, with columns of numbers to the right. text: the headings of the others."""
    rules = ["---" if heading in text else "---:" for heading in headings]
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(rules) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows])


def as_rich(record: Record) -> Table:
    """The same table for a terminal: the question above, each case above its candidates, the provenance below."""
    table = Table(title=record.question, caption=provenance(record), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings_of(record)[1:]:
        least = {"candidate": 19, FURTHER: 12}.get(heading, 17 if heading.startswith("times as fast") else 6)
        table.add_column(heading, justify="left" if heading in TEXT else "right", min_width=least)
    rows = table_rows(record)
    for case in record.rows:
        table.add_row(f"[bold]{case_name(case)}")
        for _ in case.timings:
            table.add_row(*next(rows)[1:])
        table.add_section()
    for name, why in record.left_out.items():
        table.add_row(escape(f"not measured: {name}: {why}"))
    return table


def as_line(case: Case) -> str:
    """A row as soon as it is measured: the case and each candidate's median."""
    medians = [f"{t.name} {number(t.p50_us / 1000)} ms" for t in case.timings]
    return f"{case_name(case)}: {', '.join(medians)}"


def headings_of(record: Record) -> list[str]:
    """The table's headings: unit, baseline and further numbers as the record has them."""
    unit, baselines = unit_of(record)[0], {case.baseline for case in record.rows}
    baseline = baselines.pop() if len(baselines) == 1 else "the baseline"
    speed = f"times as fast as {baseline}, p50 [p5..p95]"
    return ["case", "candidate", f"p50 {unit}", f"p95 {unit}", f"p99 {unit}", speed, *_extra_columns(record)]


def table_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """The record's rows as text, in the order of `headings_of`."""
    scale, columns = unit_of(record)[1], _extra_columns(record)
    for case in record.rows:
        for timing in case.timings:
            times = [number(us / scale) for us in (timing.p50_us, timing.p95_us, timing.p99_us)]
            if timing.n < FEWEST_FOR_P99:
                times[2] = "–"
            extra = case.extra.get(timing.name, {})
            texts = {name: number(value) for name, value in extra.items()}
            if columns == [FURTHER]:
                texts = {FURTHER: ", ".join(f"{name} {text}" for name, text in texts.items())}
            further = (texts.get(name, "") for name in columns)
            yield case_name(case), timing.name, *times, _speed(case, timing), *further


def joined(records: Sequence[Record], *, any_machine: bool = False) -> Record:
    """The rows of several records, for one table and plot, with the provenance of the first. Raises ImagineFlashError where they
    were measured on different machines, whose times say nothing of one another, unless any_machine."""
    first = records[0]
    for other in records[1:]:
        here, there = (
            record.hardware.model_dump(exclude={"memory_gib", "gpu_memory_gib"}) for record in (first, other)
        )
        if here != there and not any_machine:
            name = next(key for key in here if here[key] != there[key])
            raise ImagineFlashError(
                f"the records are of different machines ({name}: {here[name]} and {there[name]}); plot each of its own, or "
                "give --any-machine"
            )
    rows = tuple(row for record in records for row in record.rows)
    left_out = {name: why for record in records for name, why in record.left_out.items()}
    return first.model_copy(update={"rows": rows, "left_out": left_out})


def unit_of(record: Record) -> tuple[str, float]:
    """The unit that the record's times are shown in, and its microseconds."""
    shortest = min(timing.p50_us for case in record.rows for timing in case.timings)
    return ("ms", 1e3) if shortest >= 1e3 else ("µs", 1.0)


def case_name(case: Case) -> str:
    """The parameters as 'batch 4, shape 1×4×64×64'; a name ("kernel", ...) stands alone."""
    return (
        ", ".join(_plain(value) if key in NAMES else f"{key} {_plain(value)}" for key, value in case.case.items())
        or "-"
    )


def number(value: float) -> str:
    """At least three significant digits, never an exponent: 0.0123, 1.23, 12.3, 123, 12345."""
    digits = 2 - int(f"{value:.2e}".split("e")[1]) if value else 0
    return f"{value:.{min(max(digits, 0), 12)}f}"


def provenance(record: Record) -> str:
    """Where the numbers come from, on one line: device, rounds, commit, date."""
    hardware = record.hardware
    device = hardware.gpu if hardware.gpu else f"{hardware.cpu}, {hardware.cores} cores"
    rounds = sorted({timing.n for case in record.rows for timing in case.timings})
    commit = f", commit {record.git.commit[:8]}{' with changes' if record.git.dirty else ''}" if record.git else ""
    return f"{device}; n = {' or '.join(map(str, rounds))}{commit}, {record.date:%Y-%m-%d}"


def plot(record: Record, path: str | Path) -> None:
    """Writes a PNG: a point at the p50 and a whisker to the p95, per case and candidate. Raises MissingExtraError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "bench") from None
    unit, scale = unit_of(record)
    points = _points(record, scale)
    lines = sum(len(case.timings) for case in record.rows)
    figure = Figure(figsize=(9, 2 + 0.14 * lines + 0.12 * len(record.rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, places), marker in zip(points.items(), "osD^vP*X" * len(points), strict=False):
        p50, p95, heights = zip(*places, strict=True)
        whisker = [[0.0] * len(p50), [high - low for low, high in zip(p50, p95, strict=True)]]
        axes.errorbar(p50, heights, xerr=whisker, fmt=marker, capsize=3, label=name)
    middles = [-float(number) for number in range(len(record.rows))]
    axes.set_yticks(middles, [case_name(case) for case in record.rows])
    times = [time for places in points.values() for p50, p95, _ in places for time in (p50, p95)]
    if max(times) > 20 * min(times):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} per call: p50, whisker to p95")
    figure.suptitle(textwrap.fill(record.question, 80))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, title=provenance(record), title_fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def save(record: Record, out: Path) -> None:
    """Writes `out`.json, the record, and `out`.png, its plot. Raises ArtifactError, MissingExtraError."""
    write_record(record, out.with_name(f"{out.name}.json"))
    plot(record, out.with_name(f"{out.name}.png"))


def update_table_in(markdown_file: str | Path, record: Record, marker: str) -> None:
    """Puts the record's table between `<!-- bench:MARKER -->` and `<!-- /bench -->`. Raises ImagineFlashError."""
    put_between(markdown_file, as_markdown(record), marker)


def put_between(markdown_file: str | Path, table: str, marker: str) -> None:
    """The same with a table that is made. Raises ImagineFlashError."""
    text = _read(markdown_file)
    new = _with_table(text, table, marker, markdown_file)
    if new != text:
        with atomic_file(markdown_file) as temporary:
            temporary.write_text(new, encoding="utf-8", newline="")


def is_current(markdown_file: str | Path, record: Record, marker: str) -> bool:
    """Whether `update_table_in` would change nothing. Raises ImagineFlashError where the marker is missing."""
    text = _read(markdown_file)
    return _with_table(text, as_markdown(record), marker, markdown_file) == text


def _read(file: str | Path) -> str:
    try:
        with open(file, encoding="utf-8", newline="") as opened:  # line ends stay as they are
            return opened.read()
    except OSError as error:
        raise ImagineFlashError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ImagineFlashError(f"{file} is not UTF-8; save it as UTF-8") from None


def _with_table(text: str, table: str, marker: str, file: str | Path) -> str:
    start = f"<!-- bench:{marker} -->"
    if text.count(start) != 1:
        raise ImagineFlashError(
            f"{file} must hold {start} once, found {text.count(start)}; put it where the table goes"
        )
    before, after = text.split(start)
    old, end, rest = after.partition(END)
    if not end or "<!-- bench:" in old:
        raise ImagineFlashError(f"{file}: {start} is not closed; put {END} after the table")
    newline = "\r\n" if "\r\n" in text else "\n"
    table = table.replace("\n", newline)
    return f"{before}{start}{newline}{newline}{table}{newline}{newline}{END}{rest}"


def _points(record: Record, scale: float) -> dict[str, list[tuple[float, float, float]]]:
    """Candidate -> (p50, p95, height) per case; the case's index, downwards, is the middle of its candidates' heights."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for index, case in enumerate(record.rows):
        for place, timing in enumerate(case.timings):
            height = -index - 0.7 * ((place + 0.5) / len(case.timings) - 0.5)
            points.setdefault(timing.name, []).append((timing.p50_us / scale, timing.p95_us / scale, height))
    return points


def _speed(case: Case, timing: Timing) -> str:
    if timing.name == case.baseline:
        return "baseline"
    ratio = timing.ratio
    return f"{number(ratio.p50)} [{number(ratio.p5)}..{number(ratio.p95)}]"


def _extra_columns(record: Record) -> list[str]:
    names = list(dict.fromkeys(name for case in record.rows for extra in case.extra.values() for name in extra))
    return names if len(names) <= MOST_COLUMNS else [FURTHER]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)
