"""The plan of a training's memory, against what a real update takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine_flash.distill.memory import peak_of_update, plan_memory
from imagine_flash.distill.methods import METHODS, distill_recipe
from imagine_flash.distill.methods.lcm import _scalings
from imagine_flash.distill.models import load_teacher, model_of
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.task import DistillTask
from imagine_flash.tests.architectures import DRAWN
from imagine_flash.tests.commands import run
from imagine_flash.tests.pipelines import CAPTIONS

FIT = {"steps": 2, "batch": 4, "optimizer": "adamw"}
PAIR = ["a cat", "a dog"]
QUICK = {"plans": {1: [999]}, "teacher_steps": 1, "fit": FIT}


@pytest.mark.parametrize(
    "values",
    [
        {"method": "lcm"},
        {"lora": {"rank": 4}, "gradient_checkpointing": True},
        pytest.param({"method": "dmd2", "gradient_checkpointing": True}, marks=pytest.mark.slow),
        *(pytest.param({"method": name}, marks=pytest.mark.slow) for name in METHODS if name != "lcm"),
    ],
    ids=lambda values: "-".join(map(str, values.values()))[:20],
)
def test_what_is_counted_on_fake_tensors_is_what_an_update_makes(values: dict[str, Any], teacher: Path) -> None:
    recipe = distill_recipe({"method": "imagine_flash", **values, "fit": FIT})
    model = load_teacher(teacher, recipe)
    pictures = [torch.zeros(4, *model.latent_shape)]
    task = DistillTask(recipe, model, list(CAPTIONS[:4]), "", pictures=pictures)
    assert peak_of_update(task) == pytest.approx(peak_of_update(task, fake=False), rel=0.01)


def test_an_update_behind_a_plan_is_real(teacher: Path) -> None:
    """What an update looks up in tables must not come from the plan's fake tensors."""
    recipe = distill_recipe({"method": "lcm", "fit": FIT})
    model = load_teacher(teacher, recipe)
    pictures = [torch.zeros(4, *model.latent_shape)]
    task = DistillTask(recipe, model, list(CAPTIONS[:4]), "", pictures=pictures)
    _scalings.cache_clear()
    peak_of_update(task)
    assert torch.isfinite(task.loss(**task.batch(0, Part())))


def test_the_plan_counts_each_weight_once(teacher: Path) -> None:
    whole = plan_memory(teacher, distill_recipe(QUICK))
    lora = plan_memory(teacher, distill_recipe({**QUICK, "lora": {"rank": 2}}))
    weights = 4 * sum(p.numel() for p in load_teacher(teacher, distill_recipe(QUICK)).network.parameters())
    assert whole.trained == 2 * weights and whole.moments == 2 * weights  # student and average; two moments
    assert lora.trained < whole.trained / 4 and lora.frozen == whole.frozen


@pytest.mark.parametrize("kind", ["sd15", "pixart", pytest.param("sd3", marks=pytest.mark.slow)])
def test_every_network_that_trains_computes_its_activations_again(kind: str) -> None:
    """The student alone did, and dmd2's fake score, as large as it, kept all of them. Their gradients stay what they are."""
    found = []
    for checkpointing in (False, True):
        recipe = distill_recipe(
            {"method": "dmd2", "ratio": 1, "gradient_checkpointing": checkpointing, "fit": {**FIT, "batch": 2}}
        )
        model = model_of(DRAWN[kind]())
        pictures = [torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))]
        task = DistillTask(recipe, model, PAIR, "", pictures=pictures)
        networks = [part for wrapped in task.networks for part in wrapped.children()]
        assert [network.is_gradient_checkpointing for network in networks] == [checkpointing] * 2
        loss = task.loss.train()(**task.batch(0, Part()))
        loss.backward()
        gradients = {name: p.grad for name, p in task.loss.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    assert any(name.startswith("fake_score") for name in found[0][1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_the_command_says_it_and_writes_nothing(teacher: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**QUICK, "fit": {**FIT, "accumulate": 4}}), encoding="utf-8")
    done = run("distill", teacher, tmp_path / "new" / "student", "--plan-memory", "--recipe", recipe)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == [recipe]
    shared = run("distill", teacher, tmp_path / "student", "--plan-memory", "--recipe", recipe, "--shard")
    assert shared.stdout == done.stdout.replace("in all", "in all, of one process without --shard")
    sizes = [float(line.split(" GiB ")[0]) for line in done.stdout.splitlines()]
    assert len(sizes) == 5 and sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.03)
