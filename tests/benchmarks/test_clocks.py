"""The clocks of the harness: the host's, a CUDA device's, and what is said where there is none."""

import sys
from collections.abc import Callable

import pytest

from imagine_flash.benchmarks.clocks import CpuClock, clock_for
from imagine_flash.benchmarks.environment import hardware_of
from imagine_flash.benchmarks.harness import Candidate, measure
from imagine_flash.benchmarks.schema import Check
from imagine_flash.core.errors import ImagineFlashError, MissingExtraError


def test_clocks() -> None:
    assert CpuClock().seconds(1_000_000_000, 3_500_000_000) == 2.5
    assert isinstance(clock_for("cpu"), CpuClock)
    for device in ("gpu", "cuda:x", "cuda:0\n", ""):
        with pytest.raises(ImagineFlashError, match="device must be cpu, cuda or cuda:N, got "):
            clock_for(device)


def test_a_cuda_clock_without_torch_or_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ImagineFlashError, match=r"^no CUDA device for 'cuda:1'; measure on the CPU, or check nvidia-smi$"
    ):
        clock_for("cuda:1")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="needs torch"):
        clock_for("cuda")


@pytest.mark.gpu
def test_a_cuda_clock_measures_the_devices_work() -> None:
    """Ten times the work takes longer, though launching it returns at once."""
    import torch

    x = torch.randn(2048, 2048, device="cuda")

    def multiply(times: int) -> Callable[[], list[torch.Tensor]]:
        return lambda: [x @ x for _ in range(times)]

    candidates = [Candidate(name="one", run=multiply(1)), Candidate(name="many", run=multiply(10))]
    clock, check = clock_for("cuda"), Check(what="nothing", error=0, tolerance=0)
    case = measure(candidates, baseline="one", check=lambda _: check, case={}, warm_up=2, n=5, clock=clock)
    assert case["many"].ratio.p50 < 1
    assert hardware_of("cuda").gpu == torch.cuda.get_device_name()
