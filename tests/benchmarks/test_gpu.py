"""The benchmark of the GPU path, tried without one: its pictures are right, and a machine without a GPU is told so."""

from pathlib import Path

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


def test_what_takes_minutes_to_load_has_rows_of_its_own() -> None:
    """Early, but behind the first row; the second decoder says nothing new of it."""
    plain, more = gpu._cases(()), gpu._cases(gpu.ALSO)
    assert [more[0], *more[3:]] == plain
    assert more[1:3] == [{**plain[0], "also": "kernels tried out"}, {**plain[0], "also": "matrices in fp8"}]
    for options in gpu.ALSO.values():
        LoadOptions(backend="torch-compile", **options)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_cannot_be_loaded_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what compiles, which takes minutes even for these shapes."""
    monkeypatch.setattr(gpu, "CASES", gpu.CASES[:1])
    monkeypatch.delitem(gpu.ALSO, "kernels tried out")
    monkeypatch.delitem(gpu.OURS, "torch-compile")
    monkeypatch.setattr(gpu, "_compiled", lambda pipeline, mode: pipeline)
    with pytest.warns(UserWarning, match="no row with matrices in fp8: fp8 needs a GPU of compute capability 8.9"):
        rows = list(gpu._rows("tiny", "cpu", 5, mode="default"))
    assert [row.case["decoder"] for row in rows] == ["tiny", "tiny", "KL", "KL"]


@pytest.mark.slow
def test_a_row_is_checked_against_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(gpu._rows("tiny", "cpu", 5, mode=None))
    assert first.baseline == "diffusers, eager" and {t.name for t in first.timings} == {
        "diffusers, eager",
        "ours, eager",
    }
    assert first.case["decoder"] == "tiny" and first.case["run"] == 1
    assert all(check.passed for check in first.checks.values())
    assert all(extra["PSNR to float32, dB"] > 50 for extra in first.extra.values()), "on a CPU all of them are float32"
