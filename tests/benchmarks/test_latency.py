"""`bench latency` as a user runs it, on the tiny artifact; and what it compares, counts and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("psutil", reason="psutil is not installed")

from imagine_flash.benchmarks.harness import case_of
from imagine_flash.benchmarks.latency import bench, energy, models, rows
from imagine_flash.benchmarks.latency.bench import LatencyOptions, bench_latency
from imagine_flash.benchmarks.latency.candidates import BASELINES, Candidate, Worker, chosen, ours, pythons_of
from imagine_flash.benchmarks.latency.floor import COPY, RATES, Work, floor_seconds, measure_floor, work_of
from imagine_flash.benchmarks.latency.rows import Pairing
from imagine_flash.benchmarks.records import as_line, as_markdown, joined
from imagine_flash.benchmarks.schema import Case, Check, new_record, read_record
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.tests.commands import fails


@pytest.mark.slow
def test_everything_is_measured(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "MOST_OTHERS", 1.0)  # tests run beside others
    known = BASELINES["diffusers"]
    monkeypatch.setitem(BASELINES, "diffusers", replace(known, ways=known.ways[:1]))  # each costs a process
    out, here = tmp_path / "latency", {"optimum-onnx": sys.executable}
    about: Any = {"model": str(tiny_artifact), "steps": (1,), "batches": (2,), "backends": ("onnxruntime",)}
    against: Any = {"against": ("diffusers", "optimum-onnx"), "pythons": here, "teacher": (2,), "energy": True}
    bench_latency(out, LatencyOptions(**about, **against, rounds=5))
    record, told = read_record(out.with_suffix(".json")), capsys.readouterr()
    assert told.out == "" and [as_line(row) for row in record.rows] == told.err.splitlines()[-len(record.rows) :]
    floor, *measured = record.rows
    assert floor.case["what"] == "floor" and floor.extra[COPY]["GB/s"] > 0
    first, lead = measured[0], "imagine-flash onnxruntime fp32"
    assert [row.baseline for row in measured] == ["diffusers fp32", "diffusers fp32, 2 guided steps"]
    assert first.case["batch"] == 2 and first.checks["diffusers fp32"].what.startswith(
        "RMS levels from torch's picture"
    )
    for name in (lead, "diffusers fp32"):
        assert {"start s", "first ms", "PSNR dB", "text ms", "network ms", "decoder ms", "pictures/s"} < first.extra[
            name
        ].keys()
    assert first.extra[lead]["PSNR dB"] > 40 and first.extra[lead]["first start s"] > 0
    assert first.extra[lead]["network % of floor"] > 0
    assert measured[1].extra[measured[1].baseline]["network ms"] > 0
    left_out = dict(record.left_out)
    assert "not installed" in left_out.pop("optimum-onnx") or "optimum" in sys.modules
    assert set(left_out) <= {"energy"}
    assert "- Not measured: " in as_markdown(record)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "2"], "--rounds must be at least 5, got 2"),
        (["--model", "sd-turbo-shap"], "no model 'sd-turbo-shap'; did you mean 'sd-turbo-shape'?"),
        (["--against", "difusers"], "no baseline 'difusers'; did you mean 'diffusers'?"),
        (["--decoder", "tiny"], "--decoder is for shapes"),
        (["--batch", "0"], "--batch takes numbers from 1, got [0]"),
        (["--python", "optimum-onnx"], "--python takes NAME=FILE"),
        (["--steps", "9"], "holds no picture of 9 steps"),  # a record of the floor alone was left behind
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in fails("bench", "latency", *arguments, "-o", str(tmp_path / "r"))
    assert not list(tmp_path.iterdir())


def test_a_shape_that_memory_does_not_hold_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    with pytest.raises(
        ImagineFlashError, match=r"pixart-shape has 5.5 billion parameters.* 56 GiB of memory; 8 GiB are free"
    ):
        models.find_model("pixart-shape", tmp_path, decoder="tiny", steps=[1], sizes=[], batch=1)
    assert not list(tmp_path.iterdir())


def test_shapes_have_the_parameters_that_are_told() -> None:
    torch = pytest.importorskip("torch")
    from imagine_flash.benchmarks.random_students import networks_of

    for kind, billions, _ in models.SHAPES.values():
        with torch.device("meta"):
            parts = networks_of(kind)  # type: ignore[arg-type]
        total = sum(p.numel() for module in parts.values() for p in module.parameters())
        assert total / 1e9 == pytest.approx(billions, rel=0.02, abs=0.001), kind


def test_what_is_not_installed_is_left_out_and_says_so(tmp_path: Path) -> None:
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # an environment without packages
    empty.chmod(0o755)
    ways, left_out = chosen(["diffusers"], {"diffusers": str(empty)})
    assert not ways and left_out == {"diffusers": 'torch is not installed: pip install "imagine-flash[bench]"'}
    with pytest.raises(ImagineFlashError, match="cannot run the Python nowhere/python"):
        chosen(["diffusers"], pythons_of(["diffusers=nowhere/python"]))


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ImagineFlashError, match=r"imagine-flash onnxruntime: ArtifactError: .*nowhere does not exist"):
        Worker(ours(["onnxruntime"])[0], {"artifact": str(tmp_path / "nowhere"), "size": (64, 64), "batch": 1})
    silent = Candidate(name="silent", told={"candidate": "engine"}, exact=True, python="/bin/true")
    with pytest.raises(ImagineFlashError, match="silent: its process ended with 0"):
        Worker(silent, {})


def test_another_picture_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    run = Pairing(scratch=tmp_path, rounds=5)
    model = models.find_model(str(tiny_artifact), tmp_path, decoder="", steps=[], sizes=[], batch=1)
    size = model.manifest.image_size
    right = run.setting(model, size, 1, 1, {}, {})
    told = {"artifact": str(tiny_artifact), "size": size, "batch": 1}
    with Worker(ours(["onnxruntime"])[0], told) as worker:
        assert run.check(worker, right, {}).passed
        with pytest.raises(ImagineFlashError, match=r"refused: it draws another picture"):
            run.check(worker, replace(right, expected=255 - right.expected), {})
    with pytest.raises(ImagineFlashError, match=r"no picture of 3 steps at 8x8 to compare with"):
        run.setting(model, (8, 8), 1, 3, {}, {})


def _row(name: str = "a") -> Case:
    return case_of(
        {name: [1.0] * 5}, baseline=name, checks={name: Check(what="x", error=0, tolerance=0)}, case={"n": 1}
    )


def test_what_others_take_of_the_processors_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record had 378 ms of diffusers where 26 are right: another program ran."""
    import psutil

    idle, busy = psutil.cpu_times(percpu=True), psutil.cpu_times(percpu=True)
    busy = [one._replace(user=one.user + 6, idle=one.idle + 4) for one in idle]  # 6 of 10 seconds
    seen = iter([idle, busy])
    own = iter([(1.0, 0.0), (2.0, 1.0)])  # of which 2 seconds are ours
    here = SimpleNamespace(cpu_times=lambda: next(own), cpu_affinity=lambda: [0])
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: next(seen))
    monkeypatch.setattr(psutil, "Process", lambda pid=None: here)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", True, raising=False)
    assert rows.OthersLoad([7]).share() == pytest.approx(0.4)


def test_finished_rows_are_kept_when_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: Any) -> Iterator[Case]:
        yield _row()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench._Run, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_latency(tmp_path / "r", LatencyOptions(against=()))
    assert [case.baseline for case in read_record(tmp_path / "r.json").rows] == ["a"]


def test_records_of_different_machines_are_not_mixed() -> None:
    one = new_record("q", [_row("a")])
    other = one.model_copy(
        update={"hardware": one.hardware.model_copy(update={"cpu": "another"}), "rows": (_row("b"),)}
    )
    with pytest.raises(ImagineFlashError, match=r"different machines .cpu: .* and another"):
        joined([one, other])
    assert [row.baseline for row in joined([one, other], any_machine=True).rows] == ["a", "b"]
    assert json.loads(joined([one, one]).model_dump_json())["rows"]


def test_the_floor_is_measured_and_binds() -> None:
    floor = measure_floor(128, rounds=5)
    assert set(floor.extra) == {*RATES.values(), COPY}
    rate, read = floor.extra[RATES["bf16"]]["GFLOP/s"] * 1e9, floor.extra[COPY]["GB/s"] * 1e9
    assert floor_seconds(Work(operations=1e12, weights=1), floor, "bf16") == pytest.approx(1e12 / rate)
    assert floor_seconds(Work(operations=1, weights=1e9), floor, "bf16") == pytest.approx(2e9 / read)


def test_operations_are_those_that_torch_counts(tiny_artifact: Path, tiny_student: Path) -> None:
    pytest.importorskip("openvino")
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from imagine_flash.benchmarks.diffusers_student import pipeline_of

    manifest = read_artifact_manifest(tiny_artifact)
    counted = work_of(tiny_artifact, manifest, manifest.image_size, 2)["denoiser"]
    pipeline, counter = pipeline_of(tiny_student), FlopCounterMode(display=False)
    hidden = torch.zeros(2, pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim)
    exactly = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the fused ones are not counted
    with torch.no_grad(), exactly, counter:
        pipeline.unet(torch.zeros(2, *manifest.latent_shape), 1, hidden)
    assert counted.operations == pytest.approx(counter.get_total_flops(), rel=0.01)
    weights = sum(p.numel() for p in pipeline.unet.parameters())
    assert counted.weights == pytest.approx(weights, rel=0.05)


def test_energy_is_a_meter_or_the_reason_why_there_is_none() -> None:
    found = energy.meter()
    assert found.startswith(energy.NO_METER) if isinstance(found, str) else found() >= 0
