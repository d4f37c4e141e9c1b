"""The harness on a clock of our own: order, quantiles and ratios by hand, refusals, and what a record holds."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.benchmarks.environment import installed_versions
from imagine_flash.benchmarks.harness import MOST_REPEATS, Candidate, measure
from imagine_flash.benchmarks.schema import Case, Check, Record, compare, new_record, read_record, write_record
from imagine_flash.core.errors import ArtifactError, ImagineFlashError


class FakeClock:
    """A clock that only the candidates move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def candidate(self, name: str, seconds: Iterable[float] | float) -> Candidate:
        durations = iter(seconds) if isinstance(seconds, Iterable) else repeat(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(durations)

        return Candidate(name=name, run=run)


def right(_: Candidate) -> Check:
    return Check(what="largest difference from the reference", error=1e-7, tolerance=1e-6)


def measured(**changes) -> Case:
    clock = FakeClock()
    settings = {
        "candidates": [clock.candidate("slow", 0.004), clock.candidate("fast", 0.001)],
        "baseline": "slow",
        "check": right,
        "case": {"batch": 4, "shape": (4, 64, 64), "dtype": "bf16", "graph": True, "scale": 1.0},
        "warm_up": 1,
        "n": 5,
        "clock": clock,
    }
    settings |= changes
    return measure(settings.pop("candidates"), **settings)


def test_statistics_and_ratios_by_hand() -> None:
    """Medians 30 and 10 ms, yet a median ratio of 2: it is that of the rounds 2, 4, 3, 1, 0.5. Warm-up counts for nothing."""
    clock = FakeClock()
    a = clock.candidate("a", [9.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    b = clock.candidate("b", [7.0, 0.005, 0.005, 0.01, 0.04, 0.1])
    case = measure([a, b], baseline="a", check=right, case={}, warm_up=1, n=5, repeats=1, clock=clock)
    first, second = case["a"], case["b"]
    assert [t.n for t in case.timings] == [5, 5]
    assert (first.mean_us, first.p50_us, first.p95_us, first.p99_us, first.min_us) == (30e3, 30e3, 48e3, 49.6e3, 10e3)
    assert (second.mean_us, second.p50_us, second.p95_us, second.p99_us, second.min_us) == (
        32e3,
        10e3,
        88e3,
        97.6e3,
        5e3,
    )
    assert (first.ratio.p5, first.ratio.p50, first.ratio.p95) == (1, 1, 1)
    assert (second.ratio.p5, second.ratio.p50, second.ratio.p95) == (0.6, 2, 3.8)


def test_candidates_take_turns_in_their_order() -> None:
    clock = FakeClock()
    candidates = [clock.candidate(name, 0.001) for name in "ABC"]
    case = measure(candidates, baseline="B", check=right, case={}, warm_up=2, n=5, repeats=1, clock=clock)
    assert "".join(clock.calls) == "ABC" * (2 + 5)
    assert (case.warm_up, case.baseline, case.repeats) == (2, "B", 1)


def test_a_rest_is_before_each_timing_and_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()

    def sleep(seconds: float) -> None:
        clock.calls.append("rest")
        clock.now += seconds

    monkeypatch.setattr("imagine_flash.benchmarks.harness.time.sleep", sleep)
    candidates = [clock.candidate(name, 0.001) for name in "AB"]
    case = measure(candidates, baseline="A", check=right, case={}, warm_up=1, n=5, repeats=1, clock=clock, rest=0.02)
    assert clock.calls == ["A", "B", *["rest", "A", "rest", "B"] * 5]
    assert case["A"].p50_us == case["B"].p50_us == 1000


def test_repeats_make_the_fastest_timing_long_enough_and_are_the_same_for_all() -> None:
    """30 microseconds need 8 calls (7 give 210, and we double); the time is per call."""
    clock = FakeClock()
    candidates = [clock.candidate("slow", 0.003), clock.candidate("fast", 30e-6)]
    case = measure(candidates, baseline="slow", check=right, case={}, warm_up=1, n=5, clock=clock)
    assert case.repeats == 8
    assert (case["slow"].p50_us, case["fast"].p50_us, case["fast"].ratio.p50) == (3000, 30, 100)
    assert "".join(name[0] for name in clock.calls[-16:]) == "s" * 8 + "f" * 8
    assert clock.calls.count("fast") == 1 + (1 + 2 + 4 + 8) + 5 * 8
    assert measured().repeats == 1
    assert measured(repeats=3).repeats == 3


def test_repeats_end_somewhere_and_no_time_at_all_is_refused() -> None:
    clock = FakeClock()
    with pytest.raises(ImagineFlashError, match=f"^'nothing' took no time .* more than {MOST_REPEATS} repeats$"):
        measured(candidates=[clock.candidate("nothing", 0.0)], baseline="nothing", clock=clock)


def wrong(candidate: Candidate) -> Check:
    return Check(what="x_s in float32", error=0.5 if candidate.name == "fast" else 0, tolerance=1e-3)


def twins(names: str) -> list[Candidate]:
    return [FakeClock().candidate(name, 0.001) for name in names]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warm_up": 0}, "warm_up must be at least 1, got 0; first calls compile and allocate"),
        ({"n": 4}, "n must be at least 5 rounds, got 4; quantiles need them"),
        ({"repeats": 0}, "repeats must be at least 1, got 0; leave it out to have it chosen"),
        ({"baseline": "slwo"}, "the baseline 'slwo' is none of ['slow', 'fast']; did you mean 'slow'?"),
        ({"candidates": []}, "the baseline 'slow' is none of []"),
        ({"candidates": twins("aba"), "baseline": "b"}, "two candidates are called 'a'; names must differ"),
        ({"check": lambda _: None}, "'slow' was not checked: check returned NoneType, not a Check"),
        ({"check": lambda _: True}, "'slow' was not checked: check returned bool, not a Check"),
        ({"check": wrong}, "'fast' is wrong, so it was not timed: x_s in float32 differs by 0.5, allowed are 0.001"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ImagineFlashError) as error:
        measured(**changes)
    assert str(error.value) == message


def test_nothing_runs_before_every_check_has_passed() -> None:
    clock = FakeClock()
    candidates = [clock.candidate("slow", 0.001), clock.candidate("fast", 0.001)]
    with pytest.raises(ImagineFlashError, match="'fast' is wrong"):
        measured(candidates=candidates, check=wrong, clock=clock)
    assert not clock.calls


def test_a_path_in_the_parameters_is_refused_before_the_work() -> None:
    clock = FakeClock()
    with pytest.raises(ValueError, match="is a path of this machine"):
        measured(candidates=[clock.candidate("slow", 0.001)], case={"model": "/srv/models/a"}, clock=clock)
    assert not clock.calls


@pytest.mark.parametrize(
    ("error", "passed"), [(0, True), (1e-3, True), (1.1e-3, False), (np.nan, False), (np.inf, False), (-1, False)]
)
def test_a_check_passes_within_its_tolerance_only(error: float, passed: bool) -> None:
    assert Check(what="x", error=error, tolerance=1e-3).passed is passed


def test_compare() -> None:
    assert compare("x", [1.0, 2.0], np.array([1, 2.5], np.float32), 1) == Check(what="x", error=0.5, tolerance=1)
    assert not compare("x", [1.0, np.nan], [1.0, 2.0], 1).passed
    assert not compare("x", [1.0], [1.0, 1.0], 1).passed, "a shape that broadcasts is wrong all the same"
    assert compare("no elements", [], [], 0).passed


@pytest.mark.parametrize("on", [True, False])
def test_the_garbage_collector_is_paused_and_then_as_before(on: bool) -> None:
    seen = []
    clock = FakeClock()
    inner = clock.candidate("slow", 0.001)

    def run() -> None:
        seen.append(gc.isenabled())
        inner.run()
        if len(seen) == 4:
            raise RuntimeError("out of memory")

    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(RuntimeError, match="out of memory"):
            measured(candidates=[Candidate(name="slow", run=run)], clock=clock)
        assert gc.isenabled() is on
        assert measured() and gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False] * 4


def test_the_real_clock_measures_real_work() -> None:
    x = np.ones(1000)
    candidates = [Candidate(name="sum", run=x.sum), Candidate(name="loop", run=lambda: sum(range(5000)))]
    case = measured(candidates=candidates, baseline="sum", clock=None)
    assert case.repeats > 1 and all(0 < t.min_us <= t.p50_us <= t.p95_us <= t.p99_us for t in case.timings)


def record() -> Record:
    return new_record("Is fast faster than slow?", [measured()], argv=["/opt/tools/bin/bench.py", "--n", "5"])


def test_what_a_record_says() -> None:
    made = record()
    assert made.command_line == "bench.py --n 5"
    assert abs((datetime.now(UTC) - made.date).total_seconds()) < 600
    assert made.versions["numpy"] == np.__version__ and made.versions["python"] == sys.version.split()[0]
    assert (
        made.hardware.device == "cpu" and made.hardware.cpu and made.hardware.cores >= 1 and made.hardware.gpu is None
    )
    assert made.git is None or len(made.git.commit) == 40
    assert "nowhere" not in installed_versions()


def test_the_file_holds_the_record_and_no_path(tmp_path: Path) -> None:
    made, file = record(), tmp_path / "record.json"
    write_record(made, file)
    assert read_record(file) == made
    assert list(tmp_path.iterdir()) == [file]
    text = file.read_text(encoding="utf-8")
    assert (
        text.endswith("}\n") and '"/' not in text and "/opt/" not in text and str(Path(__file__).parents[2]) not in text
    )
    row = json.loads(text)["rows"][0]
    assert row["case"] == {"batch": 4, "shape": [4, 64, 64], "dtype": "bf16", "graph": True, "scale": 1.0}
    assert row["checks"]["fast"] == {"what": "largest difference from the reference", "error": 1e-7, "tolerance": 1e-6}


def test_further_numbers() -> None:
    case = measured().with_extra({"fast": {"bytes": 4096}}).with_extra({"fast": {"copy_share": 0.8}})
    assert case.extra == {"fast": {"bytes": 4096, "copy_share": 0.8}}
    assert Case.model_validate_json(case.model_dump_json()) == case
    with pytest.raises(ValueError, match="unknown candidates: \\['other'\\]"):
        case.with_extra({"other": {"bytes": 1}})


def without_check(raw: dict) -> None:
    del raw["rows"][0]["checks"]["fast"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(questoin="?"), "unknown field 'questoin'; did you mean 'question'?"),
        (lambda r: r.pop("question"), "question: Field required"),
        (lambda r: r.update(format_version=2), "format_version: Input should be 1"),
        (lambda r: r.update(format="recipe"), "format: Input should be 'imagine-flash-benchmark'"),
        (
            lambda r: r.update(command_line="bench.py --out=/srv/a b"),
            "command_line: '/srv/a b' is a path of this machine",
        ),
        (lambda r: r["hardware"].update(cores="two"), "hardware.cores: Input should be a valid integer"),
        (lambda r: r["rows"][0].update(warm_up=0), "rows.0.warm_up: Input should be greater than or equal to 1"),
        (
            lambda r: r["rows"][0]["timings"][1].update(n=3),
            "rows.0.timings.1.n: Input should be greater than or equal to 5",
        ),
        (
            lambda r: r["rows"][0]["timings"][1].update(n=6),
            "rows.0: the timings must have different names and the same n",
        ),
        (lambda r: r["rows"][0].update(baseline="b"), "rows.0: the baseline 'b' has no timing"),
        (lambda r: r["rows"][0]["checks"]["fast"].update(error=1), "rows.0: 'fast' has no passed check"),
        (without_check, "rows.0: 'fast' has no passed check"),
        (
            lambda r: r["rows"][0]["timings"][0].update(p50_us=float("nan")),
            "rows.0.timings.0.p50_us: Input should be a finite",
        ),
    ],
)
def test_damaged_records(tmp_path: Path, damage: Callable[[dict], object], message: str) -> None:
    raw = record().model_dump(mode="json")
    damage(raw)
    file = tmp_path / "record.json"
    file.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ArtifactError) as error:
        read_record(file)
    assert str(error.value).startswith(f"{file}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 5000])
def test_files_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="Invalid JSON"):
        read_record(file)
    with pytest.raises(ArtifactError, match=r"cannot read .*: No such file"):
        read_record(tmp_path / "none.json")


def test_importing_the_harness_brings_in_no_torch() -> None:
    code = "import sys, imagine_flash.benchmarks.harness; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "matplotlib", "PIL", "rich", "onnxruntime", "triton"}
