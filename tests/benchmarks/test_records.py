"""Tables equal literals, tables inside docs are generated, and the plot is a picture."""

import sys
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from imagine_flash.benchmarks.environment import Git, Hardware
from imagine_flash.benchmarks.records import as_markdown, as_rich, is_current, number, plot, provenance, update_table_in
from imagine_flash.benchmarks.schema import Case, Check, Ratio, Record, Timing
from imagine_flash.core.errors import ImagineFlashError, MissingExtraError


def timing(name: str, p50: float, ratio: tuple[float, float, float]) -> Timing:
    low, middle, high = ratio
    return Timing(
        name=name,
        n=100,
        mean_us=p50,
        p50_us=p50,
        p95_us=1.5 * p50,
        p99_us=2 * p50,
        min_us=0.9 * p50,
        ratio=Ratio(p5=low, p50=middle, p95=high),
    )


def case(parameters: dict, torch_us: float, fused_us: float, extra: dict | None = None) -> Case:
    check = Check(what="x_s", error=0, tolerance=1e-6)
    timings = (timing("torch", torch_us, (1, 1, 1)), timing("fused|1", fused_us, (1.875, 2.0123, 2.5)))
    return Case(
        case=parameters,
        baseline="torch",
        warm_up=10,
        repeats=4,
        timings=timings,
        extra=extra or {},
        checks={"torch": check, "fused|1": check},
    )


def record(*rows: Case, git: Git | None = None) -> Record:
    return Record(
        question="Does one kernel beat torch?",
        date=datetime(2026, 1, 2, tzinfo=UTC),
        command_line="bench.py",
        hardware=Hardware(device="cpu", cpu="A CPU", cores=2, memory_gib=7.5),
        versions={"python": "3.11.9"},
        git=git,
        rows=rows,
    )


SMALL = record(
    case({"batch": 1, "shape": (4, 64, 64), "cfg": True}, 24.68, 12.3, {"fused|1": {"share of copy": 0.85}}),
    case({"batch": 64, "shape": (4, 64, 64), "cfg": False}, 2468.0, 1234.0),
)
TABLE = r"""
| case | candidate | p50 µs | p95 µs | p99 µs | times as fast as torch, p50 [p5..p95] | share of copy |
|---|---|---:|---:|---:|---:|---:|
| batch 1, shape 4×64×64, cfg yes | torch | 24.7 | 37.0 | 49.4 | baseline |  |
| batch 1, shape 4×64×64, cfg yes | fused\|1 | 12.3 | 18.5 | 24.6 | 2.01 [1.88..2.50] | 0.850 |
| batch 64, shape 4×64×64, cfg no | torch | 2468 | 3702 | 4936 | baseline |  |
| batch 64, shape 4×64×64, cfg no | fused\|1 | 1234 | 1851 | 2468 | 2.01 [1.88..2.50] |  |
""".strip()


def test_the_markdown_table() -> None:
    assert as_markdown(SMALL) == TABLE


def test_many_further_numbers_share_a_column() -> None:
    numbers = {f"n{i}": i / 4 for i in range(1, 7)}
    lines = as_markdown(record(case({}, 10.0, 5.0, {"fused|1": numbers}))).splitlines()
    assert lines[0].endswith(" | further numbers |") and lines[1] == "|---|---|---:|---:|---:|---:|---|"
    assert lines[2].endswith("| baseline |  |")
    assert lines[3].endswith("| n1 0.250, n2 0.500, n3 0.750, n4 1.00, n5 1.25, n6 1.50 |")


def test_long_times_are_shown_in_milliseconds() -> None:
    assert as_markdown(record(case({}, 12_345.0, 1000.0))).splitlines() == [
        "| case | candidate | p50 ms | p95 ms | p99 ms | times as fast as torch, p50 [p5..p95] |",
        "|---|---|---:|---:|---:|---:|",
        "| - | torch | 12.3 | 18.5 | 24.7 | baseline |",
        r"| - | fused\|1 | 1.00 | 1.50 | 2.00 | 2.01 [1.88..2.50] |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12346"),
        (1e20, "1" + "0" * 20),
        (-1.234, "-1.23"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_the_table_of_a_terminal() -> None:
    console = Console(width=200, record=True, file=StringIO())
    console.print(as_rich(SMALL))
    text = console.export_text()
    for part in ("Does one kernel beat torch?", "fused|1", "2.01 [1.88..2.50]", "A CPU, 2 cores; n = 100, 2026-01-02"):
        assert part in text


def test_provenance() -> None:
    git = Git(commit="0123456789" * 4, dirty=True)
    assert (
        provenance(record(*SMALL.rows, git=git)) == "A CPU, 2 cores; n = 100, commit 01234567 with changes, 2026-01-02"
    )


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    for name, made in {"wide": SMALL, "narrow": record(case({}, 10.0, 5.0))}.items():
        plot(made, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()
            assert (
                picture.format == "PNG"
                and picture.width > 600
                and len(picture.convert("RGB").getcolors(2**20) or []) > 3
            )
    assert len(list(tmp_path.iterdir())) == 2


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib: pip install 'imagine-flash\[bench\]'"):
        plot(SMALL, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_table_between_the_markers_is_replaced(tmp_path: Path, newline: str) -> None:
    file = tmp_path / "results.md"
    before, after = "# Results\n\n<!-- bench:update -->", "<!-- /bench -->\n\n<!-- bench:x --><!-- /bench -->\nend"
    file.write_bytes(f"{before}\nold | table\n{after}".replace("\n", newline).encode())
    assert not is_current(file, SMALL, "update")
    update_table_in(file, SMALL, "update")
    assert file.read_bytes().decode() == f"{before}\n\n{TABLE}\n\n{after}".replace("\n", newline)
    assert is_current(file, SMALL, "update")
    assert not is_current(file, SMALL, "x")
    written = file.stat().st_mtime_ns
    update_table_in(file, SMALL, "update")
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker", "must hold <!-- bench:update --> once, found 0; put it where the table goes"),
        ("<!-- bench:update -->a<!-- /bench -->" * 2, "must hold <!-- bench:update --> once, found 2; put it"),
        ("<!-- bench:update -->a", "<!-- bench:update --> is not closed; put <!-- /bench --> after the table"),
        ("<!-- bench:update -->a<!-- bench:b --><!-- /bench -->", "<!-- bench:update --> is not closed; put"),
        ("<!-- /bench --><!-- bench:update -->", "<!-- bench:update --> is not closed; put"),
    ],
)
def test_markers_that_are_not_there(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "results.md"
    file.write_text(text, encoding="utf-8")
    for function in (update_table_in, is_current):
        with pytest.raises(ImagineFlashError) as error:
            function(file, SMALL, "update")
        assert str(file) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    assert file.read_text(encoding="utf-8") == text
    with pytest.raises(ImagineFlashError, match=r"cannot read .*: No such file"):
        update_table_in(tmp_path / "none.md", SMALL, "update")
