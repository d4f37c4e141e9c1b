"""Several processes compute what one does: the batch is of all of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from imagine_flash.core.errors import ImagineFlashError, RecipeError
from imagine_flash.distill.fit import fit
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_model
from imagine_flash.distill.reproducible import Part, part_of, rows_of
from imagine_flash.distill.student import distill
from imagine_flash.tests.distill.test_validation import _Slope, settings
from imagine_flash.tests.pipelines import CAPTIONS

FIT = {"steps": 3, "batch": 4, "learning_rate": 1e-3, "warmup": 0, "preview_every": 0}


def losses(run: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (run / "logs" / "student.csv").read_text().splitlines()]


@pytest.mark.parametrize("method", [{}, {"method": "dmd2", "gan_weight": 0, "ratio": 2}])
def test_accumulation_computes_what_one_batch_does(method: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    for name, accumulate in (("whole", 1), ("parts", 2)):
        recipe = distill_recipe({**method, "fit": {**FIT, "accumulate": accumulate}})
        distill(teacher, tmp_path / name, recipe, prompts=list(CAPTIONS))
    assert losses(tmp_path / "parts.run") == pytest.approx(losses(tmp_path / "whole.run"), rel=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_loss_of_one(teacher: Path, tmp_path: Path) -> None:
    """Two processes with gloo, by torch's launcher and the command; the student is theirs together."""
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("fit: " + str(FIT).replace("'", ""), encoding="utf-8")
    arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--prompts", str(tmp_path / "prompts.txt")]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    command = [*launch, "-m", "imagine_flash", "distill", str(teacher), str(tmp_path / "two"), *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    distill(teacher, tmp_path / "one", distill_recipe({"fit": FIT}), prompts=list(CAPTIONS))
    assert losses(tmp_path / "two.run") == pytest.approx(losses(tmp_path / "one.run"), rel=1e-4)
    one, two = (load_model(tmp_path / name).network.state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=3e-3, rtol=0)  # Adam makes a step of a rounding error


def test_parts_of_a_batch() -> None:
    batch = {
        "x": torch.arange(6),
        "plan": 3,
        "text": (torch.arange(12).view(6, 2),),
        "fresh": (),
        "one": torch.tensor(1),
    }
    parts = [part_of(batch, 6, Part(i, 3)) for i in range(3)]
    assert torch.cat([part["x"] for part in parts]).tolist() == list(range(6))
    assert parts[1]["text"][0].tolist() == [[4, 5], [6, 7]] and parts[1]["plan"] == 3
    with pytest.raises(RecipeError, match=r"cannot be split into 4 equal parts .* take 8"):
        rows_of(6, Part(0, 4))


@pytest.mark.slow  # a process of its own, since it joins others once
def test_processes_wait_for_the_one_that_encodes() -> None:
    """After ten minutes NCCL ended the others, while one still encoded pictures and prompts for all."""
    code = """
import torch
from imagine_flash.distill.processes import begin_training, processes
begin_training("no")
print(processes().num_processes, torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **launched, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    joined, seconds = done.stdout.split()
    assert joined == "1" and float(seconds) >= 12 * 3600


WORKER = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.fit import fit
from imagine_flash.distill.processes import begin_training
from imagine_flash.tests.distill.test_validation import _Slope, settings
begin_training("no")
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
common, own, said = folder / "common", folder / rank, []
for place, steps in ((common, 2), (common, 4), (own, 2), (own, 4)):
    try:
        said.append(str(fit(_Slope(), settings(steps=steps, keep_best=False), place)["steps"]))
    except ImagineFlashError as error:
        said.append(str(error))
(folder / f"said-{rank}").write_text("\\n".join(said))
"""


@pytest.mark.slow
def test_processes_without_a_common_folder_do_not_go_on(tmp_path: Path) -> None:
    """The first went on from its checkpoint and the other began again, each with weights of its own, and nobody said so."""
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in ("0", "1"):
        *went_on, last = (tmp_path / f"said-{rank}").read_text(encoding="utf-8").splitlines()
        assert went_on == ["2.0", "4.0", "2.0"], rank
        assert "find different runs: 2, 0 updates" in last and "OUT.run must be one folder" in last


@pytest.mark.parametrize(("other", "says"), [((0, 0), "6, 0 updates"), ((6, 0), "the best after 2, 0;")])
def test_what_each_process_found_is_compared(
    other: tuple[int, int], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes is played: it found `other`, updates and the best one."""
    fit(_Slope(at=0.09), settings(steps=6), tmp_path)

    def gathered(_: Accelerator, told: torch.Tensor) -> torch.Tensor:
        return torch.cat([told, torch.tensor([other])])

    monkeypatch.setattr(Accelerator, "gather", gathered)
    with pytest.raises(ImagineFlashError, match=says):
        fit(_Slope(at=0.09), settings(steps=8), tmp_path)
