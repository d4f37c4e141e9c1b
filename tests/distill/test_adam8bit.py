"""AdamW with moments in 8 bits: near AdamW's steps, in the memory that is planned, and the same after a kill."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.memory import plan_memory
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_teacher
from imagine_flash.distill.optimizers import build_optimizers, moment_bytes
from imagine_flash.distill.recipe import Fit
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.student import distill
from imagine_flash.distill.task import DistillTask
from imagine_flash.tests.commands import fails
from imagine_flash.tests.pipelines import CAPTIONS

FIT = {"steps": 4, "batch": 2, "schedule": "constant", "warmup": 0, "learning_rate": 1e-3, "preview_every": 0}
RECIPE = {"plans": {1: [999]}, "teacher_steps": 1, "fit": {**FIT, "optimizer": "adamw8bit"}}
NAMES = ("adamw", "adamw8bit")
with_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: the extra adam8bit"
)


@with_library
def test_its_steps_are_near_adamws() -> None:
    """On a quadratic from one start with one stream of noise; biases are too small for codes, and their steps are AdamW's."""
    torch.manual_seed(0)
    first, ends = nn.Linear(96, 96), []
    for optimizer in ("adamw", "adamw8bit"):
        module = nn.Linear(96, 96)
        module.load_state_dict(first.state_dict())
        (built,) = build_optimizers(module, Fit.model_validate({**FIT, "optimizer": optimizer}))
        noise = torch.Generator().manual_seed(1)
        for _ in range(50):
            built.zero_grad()
            x = torch.randn(8, 96, generator=noise)
            (module(x) - x).square().mean().backward()
            built.step()
        ends.append(module)
    ours, theirs = ends
    moved = (theirs.weight - first.weight).norm()
    assert moved > 1 and (ours.weight - theirs.weight).norm() < 0.05 * moved
    torch.testing.assert_close(ours.bias, theirs.bias, atol=5e-3, rtol=0)


@with_library
def test_its_moments_take_what_is_planned(teacher: Path) -> None:
    """Also a discriminator's, which has a rate and betas of its own."""
    recipe = distill_recipe({**RECIPE, "adversarial": {}})
    model = load_teacher(teacher, recipe)
    task = DistillTask(recipe, model, list(CAPTIONS), "", pictures=[torch.zeros(5, *model.latent_shape)])
    (optimizer,) = build_optimizers(task.module, recipe.fit)
    task.module(**task.batch(0, Part())).backward()
    optimizer.step()
    tables = {"qmap1", "qmap2"}  # 2 KB, which all share
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k not in tables and k != "step"]
    assert {v.dtype for v in moments} == {torch.uint8, torch.float32}
    assert sum(v.numel() * v.element_size() for v in moments) == moment_bytes(optimizer)
    plans = [plan_memory(teacher, distill_recipe({**RECIPE, "fit": {**FIT, "optimizer": name}})) for name in NAMES]
    assert plans[1].moments < plans[0].moments / 2 and plans[1].trained == plans[0].trained


@with_library
def test_stopped_and_resumed_is_the_same(teacher: Path, tmp_path: Path) -> None:
    fit: dict[str, Any] = RECIPE["fit"]
    for out, steps in (("whole", (4,)), ("resumed", (2, 4))):
        for each in steps:
            recipe = distill_recipe({**RECIPE, "fit": {**fit, "steps": each}})
            distill(teacher, tmp_path / out, recipe, prompts=list(CAPTIONS))
    logs = [(tmp_path / f"{out}.run" / "logs" / "student.csv").read_text().splitlines() for out in ("whole", "resumed")]
    assert [line.split(",")[:2] for line in logs[0]] == [line.split(",")[:2] for line in logs[1]] and len(logs[0]) == 4
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "resumed" / weights).read_bytes()
    checkpoints = [tmp_path / f"{out}.run" / "checkpoints" / "student.safetensors" for out in ("whole", "resumed")]
    assert checkpoints[0].stat().st_size == pytest.approx(checkpoints[1].stat().st_size, rel=1e-3)


def test_without_the_library_it_is_said_before_anything(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    line = fails("distill", teacher, tmp_path / "out", "--recipe", tmp_path / "recipe.json", "--prompts", "general")
    assert "needs bitsandbytes: pip install 'imagine-flash[adam8bit]'" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.json"]
    with pytest.raises(ImagineFlashError, match="adam8bit"):
        plan_memory(teacher, distill_recipe(RECIPE))
