"""How a distillation looks at its student: validations and previews, by as many rows at a time as an update has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import Model, model_of
from imagine_flash.distill.task import DistillTask
from imagine_flash.tests.pipelines import CAPTIONS, build_pipeline

PROMPTS: list[str] = [*CAPTIONS, *CAPTIONS]


def task_of(tmp_path: Path, method: str = "imagine_flash", **fit: Any) -> DistillTask:
    recipe = distill_recipe({"method": method, "cache_text": True, "fit": {"steps": 1, "batch": 12, **fit}})
    pictures = [torch.zeros(len(PROMPTS), 4, 8, 8)]
    return DistillTask(
        recipe, model_of(build_pipeline()), PROMPTS, "", pictures=pictures, text_file=tmp_path / "text.safetensors"
    )


@pytest.mark.parametrize("method", ["imagine_flash", pytest.param("add", marks=pytest.mark.slow)])
def test_what_is_seen_does_not_depend_on_how_many_rows_go_at_once(method: str, tmp_path: Path) -> None:
    one, parts = (task_of(tmp_path, method, accumulate=accumulate) for accumulate in (1, 4))
    figures = one.validate()
    assert len(figures) == len(one.recipe.plans) + 1 and min(figures.values()) > 0
    assert parts.validate() == pytest.approx(figures, rel=1e-4)
    pictures = [np.asarray(task.preview()).astype(int) for task in (one, parts)]
    assert pictures[0].std() > 10 and np.abs(pictures[0] - pictures[1]).max() <= 1


def test_text_that_waits_on_the_cpu_goes_to_the_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cache_text the first validation on a GPU failed: noise was there, text was not. All 32 prompts went at once, twice
    for the guidance, whatever the recipe's batch. `meta` stands for the GPU."""
    task, calls = task_of(tmp_path, accumulate=3), []

    def sample(self: Model, x_T: torch.Tensor, text: Any, table: Any, *, noises: Any, **how: Any) -> torch.Tensor:
        calls.append({len(x_T), *(len(each) for each in text)})
        assert {each.device for each in (x_T, *text, *noises)} == {self.device}
        return torch.zeros(x_T.shape)

    monkeypatch.setattr(Model, "sample", sample)
    for network in (task.student.network, task.teacher.network):
        network.to("meta")
    assert task.validate()["distance"] == 0
    task.preview()
    at_once = [{4}, {4}, {2}]  # of ten prompts
    assert calls == [*at_once * 4, *[{4}, {4}] * 4]
