"""`bench runtime` as a user runs it, on the tiny artifact; and what it measures is what it says."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.benchmarks import diffusers_student, processes
from imagine_flash.benchmarks.pictures import ONE_LEVEL, check_pictures, different_requests, drawn_by_torch, limits_of
from imagine_flash.benchmarks.runtime import bare_calls, draw_group
from imagine_flash.benchmarks.schema import read_record
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.engine import Engine
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.tests.commands import fails, start

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.mark.slow
def test_the_command_measures_everything(tiny_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "runtime"
    options = ("--quick", "--rounds", "5", "--backend", "onnxruntime", "--model", tiny_artifact, "-o", out)
    done = start("bench", "runtime", *options, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "times as fast as" in done.stdout and "overhead ms" in done.stdout
    rows = {
        tuple(row.case[key] for key in ("what", "route", "requests") if key in row.case): row
        for row in read_record(out.with_suffix(".json")).rows
    }
    assert list(rows) == [
        ("overhead", "stages"),
        ("overhead", "sampler"),
        ("one picture",),
        ("batching", 1),
        ("batching", 4),
        ("cold start",),
        ("load and warm up", 500),
    ]
    one = rows["one picture",]
    assert one.baseline == "diffusers, torch eager" and one.checks[one.baseline].what.startswith("levels")
    assert one.extra["Engine.load(): onnxruntime fp32"]["times the fastest bare"] > 0
    for key, row in rows.items():
        if key[0] == "overhead":
            assert row.baseline == "bare calls" and row.repeats == 1
            assert {"overhead ms", "overhead %", "p99 / p50"} < row.extra["engine.generate"].keys()
            assert row.extra["engine.generate"]["outside calls ms"] > 0
    together = rows["batching", 4].extra["together"]
    assert 0 < together["latency p50 ms"] <= together["latency p95 ms"]
    memory = rows["load and warm up", 500].extra["onnxruntime"]
    assert 0 < memory["MB before"] < memory["MB loaded"] <= memory["MB warm"] + 1 and "MB grown" in memory
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "2"], "--rounds must be at least 5, got 2"),
        (["--backend", "openvin"], "no backend 'openvin'; did you mean 'openvino'?"),
        (["--model", "{tmp}/nowhere"], "nowhere"),
        (["-o", "{tmp}/missing/r"], "is not a folder; make it first"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    given = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    assert says in fails("bench", "runtime", *given, *([] if "-o" in given else ["-o", str(tmp_path / "r")]))
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=[("onnxruntime", "stages"), ("onnxruntime", "sampler"), ("openvino", "stages")])
def engine(request: pytest.FixtureRequest, tiny_artifact: Path) -> Iterator[Engine]:
    backend, route = request.param
    pytest.importorskip(backend)
    with Engine.load(tiny_artifact, backend=backend, route=route) as engine:
        yield engine


def test_bare_calls_draw_the_reference_and_call_nothing_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawn_by_torch(engine.folder, engine.artifact)
    ways = {steps: bare_calls(engine, request) for steps, (request, _) in drawn.items()}
    calls: list[str] = []

    def listen(name: str) -> None:
        inner = getattr(engine.backend, name)
        monkeypatch.setattr(engine.backend, name, lambda *given: (calls.append(name), inner(*given))[1])

    for name in ("encode", "denoise", "update", "join", "decode", "sample"):
        listen(name)
    for steps, bare in ways.items():
        calls.clear()
        images = bare()
        assert calls == (["sample"] if engine.route == "sampler" else [*["denoise"] * steps, "decode"])
        assert check_pictures(images, drawn[steps][1][None], ONE_LEVEL).passed
        assert np.array_equal(bare(), images), "the inputs were written into"


def test_a_groups_latencies_count_from_the_first_request(tiny_artifact: Path) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        requests = different_requests(engine.artifact, 3, 2)
        assert len({request.prompt for request in requests}) == len({request.seed for request in requests}) == 3
        alone, together = [], []
        first = draw_group(engine, requests, alone, together=False)
        assert check_pictures(draw_group(engine, requests, together, together=True), first, ONE_LEVEL).passed
        assert alone == sorted(alone) and len(together) == 3, "one after another, each waits for those before"


def test_the_baseline_draws_the_reference(tiny_artifact: Path, tiny_student: Path) -> None:
    manifest = read_artifact_manifest(tiny_artifact)
    assert diffusers_student.student_of(tiny_artifact, manifest) == tiny_student
    for request, expected in drawn_by_torch(tiny_artifact, manifest).values():
        for warm in (True, False):
            picture = diffusers_student.picture_of(request, manifest)
            got = np.asarray(diffusers_student.drawer(tiny_student, **picture, warm_prompt=warm)())
            assert check_pictures(got, expected, ONE_LEVEL).passed


def test_a_student_that_is_not_the_artifacts_is_no_baseline(tiny_artifact: Path, tmp_path: Path) -> None:
    manifest = read_artifact_manifest(tiny_artifact)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    for make in (lambda: None, lambda: shutil.copytree(tiny_artifact, tmp_path / "student")):
        make()
        with pytest.raises(ImagineFlashError, match="student is not in the folder 'student' beside it"):
            diffusers_student.student_of(artifact, manifest)
    other = manifest.model_copy(update={"pipeline": "PixArtAlphaPipeline"})
    with pytest.raises(ImagineFlashError, match="the model has PixArtAlphaPipeline"):
        diffusers_student.student_of(tiny_artifact, other)


def test_limits(tiny_artifact: Path) -> None:
    manifest = read_artifact_manifest(tiny_artifact)
    assert limits_of(manifest, "fp32") == {"levels": manifest.limits["levels"]}
    assert limits_of(manifest, "bf16") == {"psnr": 35}
    half = manifest.model_copy(update={"precision": "fp16", "limits": {"psnr": 40.0}})
    assert limits_of(half, "fp16") == {"psnr": 40}


def test_the_worst_picture_counts() -> None:
    expected = np.full((3, 8, 8, 3), 100, np.uint8)
    got = expected.copy()
    got[1] += 5  # 20 log10(255 / 5) = 34.2 dB
    assert check_pictures(got, expected, {"psnr": 34}).passed and not check_pictures(got, expected, {"psnr": 35}).passed
    assert check_pictures(got, expected, {"psnr": 35}).error == 5
    assert check_pictures(got, expected, {"levels": 5}).passed and not check_pictures(got, expected, {}).passed
    for limits in ({"psnr": 10}, ONE_LEVEL):
        assert not check_pictures(got[:2], expected, limits).passed, "another number of pictures"


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ImagineFlashError, match=r"ended with 1: .*ArtifactError.*nowhere"):
        processes._call(
            "processes",
            "report_memory",
            {
                "folder": str(tmp_path / "nowhere"),
                "backend": "onnxruntime",
                "prompt": "a",
                "steps": 1,
                "seed": 0,
                "output": "x",
                "requests": 0,
            },
        )


def test_the_report_of_a_process(tiny_artifact: Path, tmp_path: Path) -> None:
    arguments = {"folder": str(tiny_artifact), "backend": "onnxruntime", "prompt": "a cat", "steps": 1, "seed": 3}
    out = tmp_path / "p.npy"
    said = processes._call("processes", "report_memory", {**arguments, "output": str(out), "requests": 7})
    found = json.loads(said)
    assert found["precision"] == "fp32" and found["MB before"] < found["MB warm"] and "MB grown" in found
    assert np.load(out).shape == (64, 64, 3)
