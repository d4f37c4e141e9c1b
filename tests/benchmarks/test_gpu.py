"""The benchmark of the GPU path, tried without one: its pictures are right, and a machine without a GPU is told so."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from imagine_flash.benchmarks import gpu
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.engine.loading import LoadOptions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_way_out_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImagineFlashError, match="no GPU here; --tiny tries the benchmark on the CPU"):
        gpu.bench_gpu(tmp_path / "gpu")
    assert not list(tmp_path.iterdir())


def test_what_compiles_comes_last() -> None:
    """It takes minutes for each batch size; the kernels' rows stand between."""
    assert gpu.PLAIN[0] == gpu.Row() and not any(row.also for row in gpu.PLAIN)
    assert gpu.COMPILING[0] == gpu.Row(also="compiled") and all(row.also for row in gpu.COMPILING)
    assert set(gpu.TUNED) < {row.also for row in gpu.COMPILING}
    for options in gpu.TUNED.values():
        LoadOptions(backend="torch-compile", **options)


@pytest.fixture(scope="module")
def pictures() -> Iterator[gpu.Pictures]:
    with gpu.Pictures("tiny", "cpu", "default") as made:
        yield made


@pytest.mark.slow
def test_a_row_is_checked_against_float32(pictures: gpu.Pictures) -> None:
    first, again = pictures.rows(gpu.PLAIN[:1], 5, math.inf)
    assert first.baseline == "diffusers, eager"
    assert {t.name for t in first.timings} == {"diffusers, eager", "ours, eager"}
    assert first.case["decoder"] == "tiny" and (first.case["run"], again.case["run"]) == (1, 2)
    assert all(check.passed for check in first.checks.values())
    assert all(extra["PSNR to float32, dB"] > 50 for extra in first.extra.values()), "on a CPU all of them are float32"
    assert not pictures.left_out


@pytest.mark.slow
def test_what_fails_is_left_out_and_the_others_are_measured(
    pictures: gpu.Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler may throw anything; and a wrong picture of this project's is remembered until the end."""
    candidates = gpu.Models.candidates

    def with_bad_ones(self: gpu.Models, row: gpu.Row) -> Iterator[tuple[str, Callable[[], gpu.Draw]]]:
        yield from candidates(self, row)
        yield "ours, in fp8", lambda: self._by_engine(row, "ours, in fp8", "torch", precision="fp8")
        yield "a compiler", lambda: math.sqrt(-1)  # type: ignore[return-value]
        yield "ours, black", lambda: lambda prompt: np.zeros((1, 64, 64, 3), np.uint8)

    monkeypatch.setattr(gpu.Models, "candidates", with_bad_ones)
    rows = list(pictures.rows((gpu.Row(steps=3),), 5, math.inf))
    assert [len(row.timings) for row in rows] == [2, 2]
    where = "decoder tiny, batch 1, steps 3, prompt cached"
    assert pictures.left_out.keys() == {f"{name}, {where}" for name in ("ours, in fp8", "a compiler", "ours, black")}
    assert "fp8 needs a GPU of compute capability 8.9" in pictures.left_out[f"ours, in fp8, {where}"]
    assert "draws another picture" in pictures.left_out[f"ours, black, {where}"]
    assert [why.partition(":")[0] for why in pictures.wrong] == [f"ours, black, {where}"]
    assert pictures.record(rows).left_out == pictures.left_out


@pytest.mark.slow
def test_no_row_begins_when_the_minutes_are_over(pictures: gpu.Pictures) -> None:
    pictures.of("tiny")
    assert not list(pictures.rows((gpu.Row(batch=4),), 5, 0.0))
    assert pictures.left_out["decoder tiny, batch 4, steps 1, prompt cached"] == "the minutes were over"
