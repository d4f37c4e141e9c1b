"""`bench serve` as a user runs it, on the tiny artifact."""

import os
from pathlib import Path

import pytest

from imagine_flash.benchmarks import serve
from imagine_flash.benchmarks.harness import case_of
from imagine_flash.benchmarks.schema import Check, read_record
from imagine_flash.benchmarks.serve import bench_serve
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.tests.commands import fails, start


@pytest.mark.slow
def test_the_command_measures_speed(tiny_artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "serve"
    only = [part for name in ("overhead", "typing", "load", "greedy") for part in ("--only", name)]
    options = ("--quick", "--rounds", "5", "--backend", "onnxruntime", "--model", tiny_artifact, "-o", out, *only)
    done = start("bench", "serve", *options, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "times as fast as" in done.stdout and "overhead p50 ms" in done.stdout
    rows = {
        (row.case["what"], row.case.get("sessions", row.case.get("steps", 0))): row
        for row in read_record(out.with_suffix(".json")).rows
    }
    assert list(rows) == [
        ("overhead", 1),
        ("overhead", 3),
        ("typing", 1),
        ("typing", 4),
        ("load", 1),
        ("a greedy client", 3),
    ]
    for way in ("HTTP", "WebSocket"):
        extra = rows["overhead", 3].extra[way]
        assert set(extra) == {"overhead p50 ms", "overhead p95 ms"}
    for way in ("every key in turn", "latest wins"):
        row = rows["typing", 4]
        extra, keys = row.extra[way], row.case["keys"]
        assert (
            isinstance(keys, int)
            and 0 <= extra["never shown"] <= extra["stale"] < extra["pictures drawn"] <= keys * row[way].n
        )
    assert rows["typing", 4].extra["every key in turn"]["pictures drawn"] == 5 * 8
    load = rows["load", 1].extra["HTTP"]
    assert 0 < load.pop("clients' % of processors") < 100
    assert load.pop("% of the throughput") > 0 and load.pop("MB grown") is not None and load.pop("own MB grown") < 50
    assert load == {"lost": 0, "doubled": 0, "5xx": 0, "429 repeated": 0}
    greedy = rows["a greedy client", 3]
    assert greedy["beside a greedy client"].n == 5
    assert greedy.extra["beside a greedy client"]["greedy pictures"] > 0, (
        "it was refused, and took nothing from anybody"
    )
    assert greedy.extra["beside a greedy client"]["greedy refused"] == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.weekly
def test_the_command_measures_replicas_on_ray(tiny_artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    out = tmp_path / "serve"
    options = ("--quick", "--rounds", "5", "--backend", "onnxruntime", "--model", tiny_artifact, "-o", out)
    done = start("bench", "serve", "--only", "ray", *options, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    overhead, load = read_record(out.with_suffix(".json")).rows
    for way in ("HTTP", "HTTP, Ray Serve"):
        assert overhead.extra[way].keys() == {"overhead p50 ms", "overhead p95 ms"}
        assert load.extra[way]["lost"] == load.extra[way]["doubled"] == 0


@pytest.mark.slow
def test_what_was_measured_before_an_error_is_kept(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def refused(*_: object) -> None:
        raise ImagineFlashError("a picture is wrong")

    monkeypatch.setattr(serve, "beside_a_greedy_client", refused)
    settings = {"rounds": 5, "only": ("overhead", "greedy"), "quick": True}
    with pytest.raises(ImagineFlashError, match="is wrong"):
        bench_serve(tmp_path / "serve", model=tiny_artifact, backend="onnxruntime", **settings)  # type: ignore[arg-type]
    assert [row.case["steps"] for row in read_record(tmp_path / "serve.json").rows] == [1, 3]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "2"], "--rounds must be at least 5, got 2"),
        (["--requests", "10"], "--requests must be at least 640, got 10"),
        (["--only", "bomb"], "--only must be of overhead, typing, load"),
        (["--backend", "openvin"], "no backend 'openvin'; did you mean 'openvino'?"),
        (["--model", "{tmp}/nowhere"], "nowhere"),
        (["-o", "{tmp}/missing/r"], "is not a folder; make it first"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    given = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    assert says in fails("bench", "serve", *given, *([] if "-o" in given else ["-o", str(tmp_path / "r")]))
    assert not list(tmp_path.iterdir())


RIGHT = Check(what="levels", error=0, tolerance=1)


def test_a_row_of_samples_taken_elsewhere() -> None:
    samples = {"a": [0.01, 0.02, 0.03, 0.04, 0.05], "b": [0.005, 0.005, 0.01, 0.04, 0.1]}
    case = case_of(samples, baseline="a", checks=dict.fromkeys(samples, RIGHT), case={"what": "typing"}, repeats=3)
    assert (case["a"].p50_us, case["b"].p50_us, case["b"].ratio.p50, case.repeats) == (30e3, 10e3, 2, 3)


@pytest.mark.parametrize(
    ("samples", "checks", "says"),
    [
        ({"a": [1.0] * 5, "b": [1.0] * 6}, {}, r"the same number of samples, got \[5, 6\]"),
        ({"a": [1.0] * 4, "b": [1.0] * 4}, {}, "at least 5 rounds, got 4"),
        ({"b": [1.0] * 5}, {}, "the baseline 'a' is none of"),
        ({}, {}, "the baseline 'a' is none of"),
        ({"a": [1.0] * 5, "b": [0.0] * 5}, {}, "'b' took no time"),
        ({"a": [1.0] * 5, "b": [1.0] * 5}, {"b": Check(what="levels", error=2, tolerance=1)}, "'b' is wrong"),
        ({"a": [1.0] * 5, "b": [1.0] * 5}, {"b": None}, "'b' was not checked"),
    ],
)
def test_a_row_of_samples_is_refused(samples: dict, checks: dict, says: str) -> None:
    with pytest.raises(ImagineFlashError, match=says):
        case_of(samples, baseline="a", checks={"a": RIGHT, "b": RIGHT, **checks}, case={})
