"""A student that is shared out over processes learns what one process learns, and its checkpoints are anybody's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as processes
from torch.distributed.tensor import DTensor

from imagine_flash.core.errors import RecipeError
from imagine_flash.distill.data.captioned import PictureSource
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_model, model_of
from imagine_flash.distill.optimizers import build_average
from imagine_flash.distill.recipe import Fit
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.sharding import agreed, check_sharding, gather, let_go, part_like, shard, whole
from imagine_flash.distill.student import distill
from imagine_flash.distill.task import DistillTask
from imagine_flash.tests.commands import fails
from imagine_flash.tests.distill.picture_sets import image_folder
from imagine_flash.tests.pipelines import CAPTIONS, build_pipeline

LOOKS = {"preview_every": 2, "validate_every": 2, "keep_best": True}
FIT: dict[str, Any] = {"batch": 4, "schedule": "constant", "warmup": 0, "learning_rate": 1e-3, "preview_every": 0}
PLAIN: dict[str, Any] = {"plans": {1: [999], 2: [999, 499]}, "teacher_steps": 1, "fit": FIT}
# recipe, and how far a loss may be: bfloat16 rounds in another order, and a discriminator's share is of norms in each process
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({**PLAIN, "fit": {**FIT, **LOOKS, "accumulate": 2}}, 1e-4),
    "bf16": ({**PLAIN, "fit": {**FIT, "mixed_precision": "bf16"}}, 2e-2),
    "lora": ({**PLAIN, "lora": {"rank": 4}, "gradient_checkpointing": True, "adversarial": {"ramp": 0}}, 1e-3),
    "lcm": ({"method": "lcm", "fit": FIT}, 1e-4),
    "dmd2": ({"method": "dmd2", "fit": {**FIT, **LOOKS}}, 1e-3),
}
WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from imagine_flash.tests.distill.test_sharding import distilled
for name, recipe, steps in json.loads(sys.argv[2]):
    distilled(Path(sys.argv[1]), name, recipe, steps, shared=True)
"""


def distilled(folder: Path, name: str, recipe: str, steps: int, *, shared: bool) -> None:
    """`steps` updates of one of RUNS into a student of that name."""
    values, _ = RUNS[recipe]
    parsed = distill_recipe({**values, "fit": {**values["fit"], "steps": steps}})
    needs_pictures = "method" in values or "adversarial" in values
    data: dict[str, Any] = {"pictures": PictureSource(place=str(folder / "set"))} if needs_pictures else {}
    distill(folder / "teacher", folder / name, parsed, shared=shared, **(data or {"prompts": list(CAPTIONS)}))


def losses(folder: Path, name: str) -> list[float]:
    return [float(row.split(",")[1]) for row in (folder / f"{name}.run/logs/student.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharding")
    build_pipeline().save_pretrained(place / "teacher", safe_serialization=True)
    image_folder(place / "set", ".txt")
    return place


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone, in which FSDP does what it does among several."""
    processes.init_process_group("gloo", store=processes.HashStore(), rank=0, world_size=1)
    yield
    processes.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stopped", "others"),
    [("plain", ()), pytest.param("dmd2", [*RUNS][:-1], marks=pytest.mark.weekly)],  # dmd2 has two networks that learn
)
def test_two_sharing_processes_learn_what_one_does(stopped: str, others: Sequence[str], folder: Path) -> None:
    """With previews, validations and the best weights; stopped and resumed by two, and by one alone."""
    from diffusers import DiffusionPipeline

    work = [(f"two {name}", name, 4) for name in others]
    work += [(f"two {stopped}", stopped, 2), (f"two {stopped}", stopped, 4), ("then one", stopped, 2)]
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, str(folder / "worker.py"), str(folder), json.dumps(work)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    distilled(folder, "then one", stopped, 4, shared=False)
    for name in (*others, stopped):
        far = RUNS[name][1]
        distilled(folder, f"one {name}", name, 4, shared=False)
        assert losses(folder, f"two {name}") == pytest.approx(losses(folder, f"one {name}"), rel=far), name
    assert losses(folder, "then one") == pytest.approx(losses(folder, f"one {stopped}"), rel=RUNS[stopped][1])
    assert (folder / f"two {stopped}.run/previews/student-000004.png").is_file()
    for name, oracle in ((f"two {stopped}", f"one {stopped}"), ("then one", f"one {stopped}")):
        one = load_model(folder / oracle).network.state_dict()
        pipeline: Any = DiffusionPipeline.from_pretrained(str(folder / name), dtype=torch.float32)
        for key, value in pipeline.unet.state_dict().items():
            torch.testing.assert_close(value, one[key], atol=3e-3, rtol=0)  # Adam makes a step of a rounding error
    if "lora" in others:
        DiffusionPipeline.from_pretrained(str(folder / "teacher")).load_lora_weights(str(folder / "two lora"))


def test_what_is_shared_out_is_whole_again(one_process: None) -> None:
    """In a group of one process: parts are DTensors, and gathering gives the weights back."""
    unet = build_pipeline().unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    shard([unet], torch.device("cpu"))
    parts = dict(unet.named_parameters())
    assert all(isinstance(part, DTensor) for part in parts.values())
    assert all(torch.equal(whole(part), before[name]) for name, part in parts.items())
    again = part_like(before["conv_in.weight"], parts["conv_in.weight"])
    assert isinstance(again, DTensor) and torch.equal(whole(again), before["conv_in.weight"])
    gather(unet)
    weights = unet.state_dict()
    assert not any(isinstance(value, DTensor) for value in weights.values())
    assert all(torch.equal(value, before[name]) for name, value in weights.items()) and len(weights) == len(before)
    assert agreed(0.5, torch.device("cpu")) == 0.5


def test_what_is_shared_out_has_an_average_on_gpus_too(one_process: None) -> None:
    """There the average was copied by one launch for all weights, which torch does not know for parts: no student was written."""
    unet = build_pipeline().unet
    shard([unet], torch.device("cpu"))
    weights = list(unet.parameters())
    average = build_average(weights, Fit.model_validate({**FIT, "steps": 1}), on_gpu=True, shared=True)
    before = whole(weights[0].detach()).clone()
    average.step(weights)
    with torch.no_grad():
        weights[0].zero_()
    average.store(weights)
    average.copy_to(weights)
    assert torch.equal(whole(weights[0].detach()), before)
    average.restore(weights)
    assert not whole(weights[0].detach()).any()


@pytest.mark.parametrize("values", [{"method": "dmd2", "ratio": 1}, {**PLAIN, "adversarial": {"ramp": 0}}])
def test_what_reads_features_has_the_gradients_of_whole_networks(values: dict[str, Any], one_process: None) -> None:
    """dmd2's fake score trains by forward passes that are cut short, and a gradient by their input comes between."""
    recipe, found = distill_recipe({**values, "fit": {**FIT, "steps": 2}}), []
    for shared in (False, True):
        teacher = model_of(build_pipeline())
        pictures = torch.randn(len(CAPTIONS), *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
        task = DistillTask(recipe, teacher, list(CAPTIONS), "", pictures=[pictures])
        if shared:
            shard((*task.networks, *task.resting), torch.device("cpu"))
            rows = [p for network in (*task.networks, *task.resting) for p in network.parameters()]
            assert len(task.resting) == 1 and all(isinstance(row, DTensor) for row in rows)
        losses = []
        for step in range(2):  # the second one finds what the first has left behind
            task.module.zero_grad()
            losses.append(task.module(**task.batch(step, Part())))
            losses[-1].backward()
            for network in (task.module, *task.resting):
                let_go(network)
        gradients = {name: whole(p.grad) for name, p in task.module.named_parameters() if p.grad is not None}
        found.append((torch.stack(losses).detach(), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_optimisers_that_read_whole_weights_are_refused(optimizer: str) -> None:
    with pytest.raises(RecipeError, match=f"--shard needs fit.optimizer: adamw; {optimizer} reads whole weights"):
        check_sharding(Fit.model_validate({**FIT, "steps": 1, "optimizer": optimizer}), 2)


def test_one_process_has_nobody_to_share_with(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({**PLAIN, "fit": {**FIT, "steps": 1}}))
    line = fails("distill", folder / "teacher", tmp_path / "out", "--recipe", recipe, "--prompts", "general", "--shard")
    assert "and there is one; start more: accelerate launch --num_processes 2" in line
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP"])
def test_other_ways_of_sharing_out_are_refused(name: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """accelerate told to install DeepSpeed, with which the training would have failed as well."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    line = fails("distill", folder / "teacher", tmp_path / "out", "--prompts", "general")
    assert f"asks for {name}, which this training does not follow; launch without it, and share out by --shard" in line
    assert list(tmp_path.iterdir()) == []
