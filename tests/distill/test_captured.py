"""Updates by replay: the same losses, gradients and weights as computed anew; on a CPU replays call the recorded work again."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.captured import CapturedLoss, CudaGraphs
from imagine_flash.distill.methods import METHODS, distill_recipe
from imagine_flash.distill.models import load_model
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.run import Run
from imagine_flash.distill.task import DistillTask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
CAPTIONS = ["a cat", "a dog", "two owls", "a red apple"]


def again(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """As a CUDA graph does: recording computes nothing that lasts, and a replay writes where the record's result stood."""
    place = torch.zeros(())

    def replay() -> None:
        place.copy_(work())

    return replay, place


def recorder() -> Any:
    return CudaGraphs(threading.Lock()) if DEVICE == "cuda" else again


class Toy(nn.Module):
    """A loss whose learners depend on the batch's plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, ...], power: int, share: Any, both: bool) -> Any:
        value = self.always(x).pow(power).mean() + pair[0].mean() * self.always(pair[1]).mean()
        if isinstance(share, torch.Tensor) or share:
            value = value + share * self.always.weight.square().sum()
        return value + self.sometimes(x).square().mean() if both else value


def batches(count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, 3, generator=draw)
    values = [{"power": 1 + i % 2, "share": (0.0, 0.1 * i)[i % 5 > 1], "both": i % 3 == 0} for i in range(count)]
    return [{"x": x[i], "pair": (x[i, :1], 2 * x[i]), **value} for i, value in enumerate(values)]


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.to(DEVICE)
        if isinstance(v, torch.Tensor)
        else tuple(map(torch.Tensor.to, v, (DEVICE,) * len(v)))
        if isinstance(v, tuple)
        else v
        for k, v in batch.items()
    }


@pytest.mark.parametrize("parts", [1, 3])
def test_replays_leave_the_losses_and_gradients_of_plain_updates(parts: int) -> None:
    torch.manual_seed(0)
    plain, captured = Toy().to(DEVICE), Toy().to(DEVICE)
    captured.load_state_dict(plain.state_dict())
    replays = CapturedLoss(captured, captured.parameters(), recorder())
    drawn = batches(60 * parts)
    for i in range(60):
        own = drawn[i * parts : (i + 1) * parts]
        plain.zero_grad(set_to_none=True)
        loss = torch.stack([plain(**moved(batch)) for batch in own]).mean()
        loss.backward()
        assert replays.update(own) == pytest.approx(loss.item(), rel=1e-5)
        for (name, p), q in zip(plain.named_parameters(), captured.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)
        with torch.no_grad():
            for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
                p.sub_(0.01 * p.grad if p.grad is not None else 0)
                q.sub_(0.01 * q.grad if q.grad is not None else 0)
    assert len(replays.kinds) == 8
    assert all(kind.replay is not None for kind in replays.kinds.values())


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "imagine_flash")) for name in sorted(METHODS)]
)
def test_every_method_trains_to_the_same_student(method: str, teacher: Path, tmp_path: Path) -> None:
    """Twenty updates with every draw of plans, steps and phases: the losses one by one, and the averaged weights."""
    ends, losses = [], []
    for replays in (False, True):
        model, fit = load_model(teacher).to(DEVICE), {"steps": 20, "batch": 2, "warmup": 2, "captured": replays}
        extra = {"adversarial": {"ramp": 4}} if method == "imagine_flash" else {}
        recipe = distill_recipe({"method": method, "fit": fit, **extra})
        pictures = [torch.randn(len(CAPTIONS), *model.latent_shape, generator=torch.Generator().manual_seed(1))]
        task = DistillTask(recipe, model, list(CAPTIONS), "", pictures=pictures)
        run = Run(task, recipe.fit, [], tmp_path, shared=False)
        if replays and DEVICE == "cpu":
            learners = [p for p in task.module.parameters() if p.requires_grad]
            run.captured = CapturedLoss(run.wrapped, learners, again)
        assert (run.captured is not None) == replays
        losses.append([run.update([task.batch(step, Part())], step) for step in range(20)])
        assert run.ema.optimization_step == (4 if method == "dmd2" else 20), "of updates that moved the student"
        run.ema.copy_to(run.averaged)
        ends.append([p.detach().cpu() for p in run.averaged])
    # on a GPU rounding differs from run to run, and Adam's first steps are as long for a gradient that is little else
    assert losses[1] == pytest.approx(losses[0], rel=3e-2 if DEVICE == "cuda" else 1e-5)
    moved = sum((a - b.cpu()).square().sum() for a, b in zip(ends[0], model.network.parameters(), strict=True)) ** 0.5
    apart = sum((a - b).square().sum() for a, b in zip(*ends, strict=True)) ** 0.5
    assert moved > 0
    assert apart < (0.05 if DEVICE == "cuda" else 1e-3) * moved


def test_an_update_that_no_graph_can_hold_says_how_to_go_on() -> None:
    def refuses(work: Callable[[], torch.Tensor]) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")

    toy = Toy().to(DEVICE)
    replays, batch = CapturedLoss(toy, toy.parameters(), refuses), batches(1)
    replays.update(batch)
    with pytest.raises(ImagineFlashError, match=r"not permitted when stream is capturing\); set fit.captured: false$"):
        replays.update(batch)
