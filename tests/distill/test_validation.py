"""What a training says of itself: validations, the best weights, trackers."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from imagine_flash.core.errors import ArtifactError, ImagineFlashError, RecipeError
from imagine_flash.distill.best import Best
from imagine_flash.distill.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from imagine_flash.distill.data.kept import kept
from imagine_flash.distill.fit import fit
from imagine_flash.distill.memory import LiveBytes
from imagine_flash.distill.recipe import Fit, parse_recipe
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.run import Task
from imagine_flash.tests.commands import fails


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.w - x) ** 2).mean()


class _Slope(Task):
    """w goes up towards 10, and the validation is best at `at`."""

    name, fingerprint = "line", "line"
    module: _Line

    def __init__(self, at: float = 0.3) -> None:
        self.module, self.at, self.seen = _Line(), at, []

    def batch(self, step: int, part: Part) -> dict[str, Any]:
        return {"x": torch.full((2,), 10.0)}

    def validate(self) -> dict[str, float]:
        self.seen.append(self.module.w.item())
        return {"away": abs(self.seen[-1] - self.at), "w": self.seen[-1]}


def settings(**more: Any) -> Fit:
    common = {"warmup": 0, "schedule": "constant", "learning_rate": 0.05, "ema_decay": 0.0, "preview_every": 0}
    return Fit.model_validate({"steps": 20, "batch": 2, "validate_every": 2, "keep_best": True, **common, **more})


def test_the_best_validation_is_the_result(tmp_path: Path) -> None:
    task = _Slope()
    figures = fit(task, settings(), tmp_path)
    assert len(task.seen) == 10 and figures["steps"] == 20
    nearest = min(task.seen, key=lambda w: abs(w - task.at))
    assert task.module.w.item() == nearest and figures["best"] == pytest.approx(abs(nearest - task.at))
    assert task.seen[int(figures["best_step"]) // 2 - 1] == nearest
    last = _Slope()
    fit(last, settings(keep_best=False), tmp_path / "last")
    assert last.module.w.item() == pytest.approx(task.seen[-1])


def test_patience_ends_it_and_the_same_command_goes_no_further(tmp_path: Path) -> None:
    task = _Slope()
    first = fit(task, settings(patience=4), tmp_path)
    assert first["steps"] == first["best_step"] + 4 < 20
    again = _Slope()
    assert fit(again, settings(patience=4), tmp_path)["steps"] == first["steps"] and not again.seen
    assert again.module.w.item() == task.module.w.item()


def test_a_run_in_two_sittings_finds_the_same_best(tmp_path: Path) -> None:
    for steps in (4, 20):  # a constant rate may go on with more
        task = _Slope(at=0.09)
        figures = fit(task, settings(steps=steps), tmp_path)
    whole = _Slope(at=0.09)
    assert figures["best_step"] == fit(whole, settings(), tmp_path / "whole")["best_step"] == 2
    assert task.module.w.item() == whole.module.w.item()


def test_a_tracker_is_told_losses_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker registered with accelerate as its documentation says: the packages of the known ones are no dependencies."""
    pytest.importorskip("accelerate", minversion="1.15", reason="older ones know no trackers but their own")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    told: list[tuple[int | None, dict[str, float]]] = []

    class Written(GeneralTracker):
        name, requires_logging_directory = "written", False

        def __init__(self, run_name: str, **_: Any) -> None:
            super().__init__()
            self.run_name = run_name

        def start(self) -> None: ...

        @property
        def tracker(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append((None, {"steps": values["steps"]}))

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            told.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "written", Written)
    monkeypatch.setitem(sys.modules, "written", ModuleType("written"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    fit(_Slope(), settings(), tmp_path, track=["written"])
    assert told[0] == (None, {"steps": 20})
    assert [step for step, values in told if "loss" in values] == [10, 20]
    assert [step for step, values in told if "away" in values] == list(range(2, 21, 2))


def test_looks_and_losses_are_in_the_precision_of_the_run(tmp_path: Path) -> None:
    """Validations and previews ran in float32, which at full size the card had no memory for. And torch 2.9 kept the copy of a
    weight that a rollout made without a graph, so most weights of a network had no gradient in bf16."""
    seen: dict[str, tuple[bool, bool]] = {}

    def look(name: str) -> None:
        seen[name] = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()

    class Line(_Line):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            look("loss")
            return super().forward(x)

    class Looks(_Slope):
        def validate(self) -> dict[str, float]:
            look("validate")
            return {"away": 1.0}

        def preview(self) -> None:
            look("preview")

    task = Looks()
    task.module = Line()
    fit(task, settings(steps=2, preview_every=2, mixed_precision="bf16"), tmp_path)
    assert seen == dict.fromkeys(("loss", "validate", "preview"), (True, False))


def test_checkpoints_take_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a full-size run, tens of gigabytes, was written every two minutes."""
    clock, saved = [0.0], []

    class Line(_Line):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock[0] += 1
            return super().forward(x)

    def save(path: Path, state: Any, *, step: int, **_: Any) -> None:
        saved.append(step)
        clock[0] += 0.5

    monkeypatch.setattr("imagine_flash.distill.fit.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("imagine_flash.distill.fit.save_checkpoint", save)
    task = _Slope()
    task.module = Line()
    fit(task, settings(steps=30, validate_every=0, keep_best=False, checkpoint_minutes=0.05), tmp_path)
    assert saved == [4, 15, 26, 30]  # more than 3 seconds after the start, then more than 10 after one of half a second


def test_a_checkpoint_keeps_each_weight_once_in_memory(tmp_path: Path) -> None:
    """It was copied twice on its way from a GPU, and once for nothing on a CPU; what shares memory is still copied apart."""
    module: Any = nn.Linear(256, 256)
    module.register_parameter("tied", module.weight)
    state = TrainingState(module=module, ema=EMAModel([module.bias]), optimizers=[], task="line", fingerprint="line")
    with LiveBytes() as live:
        save_checkpoint(tmp_path / "state.safetensors", state, step=3, seconds=4.0)
    assert live.peak <= 2 * 4 * 256 * 256 + 4 * 1024  # the weight itself, and a copy for its second name
    found = load_file(tmp_path / "state.safetensors")
    assert torch.equal(found["weight.tied"], module.weight) and torch.equal(found["weight.weight"], module.weight)
    assert load_checkpoint(tmp_path / "state.safetensors", state) == (3, 4.0)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Each kill while a checkpoint was written left its whole size on the disk, for ever."""
    left = [".tmpa1B2c3", "checkpoints/.tmpXyZ", "checkpoints/.line.safetensors.tmp-0a1b2c3d.safetensors"]
    stays = ["text.safetensors", "checkpoints/line.safetensors.bak", "logs/.tmpdir"]
    for name in left + stays:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half a checkpoint")
    fit(_Slope(), settings(steps=2), tmp_path)
    assert [name for name in left + stays if (tmp_path / name).exists()] == stays


@pytest.mark.parametrize("what", ["checkpoint", "best", "kept"])
def test_a_full_disk_is_one_line(what: str, tmp_path: Path) -> None:
    """safetensors' own error is no OSError and ended in a traceback. A limit on the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")
    path, module = tmp_path / "run" / "file.safetensors", nn.Linear(256, 256)
    state = TrainingState(module=module, ema=EMAModel([module.bias]), optimizers=[], task="line", fingerprint="line")
    writes = {
        "checkpoint": lambda: save_checkpoint(path, state, step=3, seconds=4.0),
        "best": lambda: Best(path, "line", 0).offer({"away": 1.0}, 1, [module.weight.detach()]),
        "kept": lambda: kept(path, "x", lambda: {"a": module.weight.detach()}),
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(
            ArtifactError, match=r"^cannot write .*file\.safetensors \(.*\); make room on its disk"
        ) as error:
            writes[what]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and not list(path.parent.iterdir())


def test_the_best_weights_that_are_gone_are_one_line(tmp_path: Path) -> None:
    """Where machines have no common disk, only the first process can read them."""
    best = Best(tmp_path / "best.safetensors", "line", 0)
    best.offer({"away": 1.0}, 1, [torch.zeros(1)], write=False)
    with pytest.raises(ArtifactError, match=r"need an OUT\.run that all of them see"):
        best.restore([torch.zeros(1)])


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="need validate_every"):
        parse_recipe({"steps": 1, "keep_best": True}, Fit, "x.yaml")
    with pytest.raises(ImagineFlashError, match="did you mean 'tensorboard'"):
        fit(_Slope(), settings(), tmp_path, track=["tensorbord"])
    assert "--track aim needs the package aim: pip install aim" in fails(
        "train-teacher", tmp_path / "t", "--track", "aim"
    )
    assert not list(tmp_path.iterdir())
