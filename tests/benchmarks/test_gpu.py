"""The benchmark of the GPU path, tried without one: its pictures are right, and a machine without a GPU is told so."""

from pathlib import Path

import pytest
import torch

from imagine_flash.benchmarks import gpu
from imagine_flash.core.errors import ImagineFlashError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_way_out_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImagineFlashError, match="no GPU here; --tiny tries the benchmark on the CPU"):
        gpu.bench_gpu(tmp_path / "gpu")
    assert not list(tmp_path.iterdir())


def test_kernels_that_are_tried_out_have_rows_of_their_own() -> None:
    """Early, but behind the first row, since they take minutes; the second decoder says nothing new of them."""
    plain, tried = gpu._cases(tunes=False), gpu._cases(tunes=True)
    assert tried[1] == {**plain[0], "kernels": "tried out"} and [tried[0], *tried[2:]] == plain


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
