"""Plain diffusers folders, without imagine_flash.json: drawn as diffusers' own pipeline draws them with its own scheduler."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError, ImagineFlashError
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.folders.reading import read_student_manifest
from imagine_flash.models.describe import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.tests import pipelines

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAILING: dict[str, Any] = SD | {"timestep_spacing": "trailing"}
SCHEDULERS: dict[str, Any] = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**TRAILING),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**TRAILING),
    "ddim": lambda: diffusers.DDIMScheduler(**TRAILING, clip_sample=False, set_alpha_to_one=False),
    "lcm": lambda: diffusers.LCMScheduler(**SD),
    "tcd": lambda: diffusers.TCDScheduler(**SD),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipeline with each of these schedulers, as diffusers saves it."""
    found, root = {}, tmp_path_factory.mktemp("plain")
    pipeline = pipelines.build_pipeline()
    for name, build in SCHEDULERS.items():
        pipeline.scheduler = build()
        pipeline.save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def diffusers_picture(folder: Path, steps: int, guidance: float, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The pipeline's own picture from our noises."""
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    draws = iter([torch.from_numpy(step_noise(7, 1, (4, 8, 8), i + 1)) for i in range(steps)])
    module = type(pipeline.scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(draws), raising=False)
    latents = torch.from_numpy(step_noise(7, 1, (4, 8, 8), 0))
    given: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "latents": latents,
        "output_type": "np",
    }
    return (pipeline("a cat", **given).images[0] * 255).round().astype(np.uint8)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plain_folder_is_drawn_as_diffusers_draws_it(
    folders: dict[str, Path], name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of(folders[name], ModelOptions(steps=(steps,)))
    with Engine.load(student, backend="torch") as engine:
        for guidance in (1.0, 3.0) if steps == 4 else (1.0,):
            request = GenerateRequest(prompt="a cat", steps=steps, seed=7, guidance=guidance)
            got = engine.generate(request).images[0]
            assert psnr(got, diffusers_picture(folders[name], steps, guidance, monkeypatch)) >= 45


def test_what_was_taken_from_where_is_kept(folders: dict[str, Path]) -> None:
    found = read_student_manifest(student_of(folders["lcm"], ModelOptions(steps=(4,), guidance=2.0)))
    assert found.plans == {4: [999, 759, 499, 259]} and found.sampler.boundary == 10.0 and found.guidance.default == 2.0
    assert found.sources["sampler"] == "the scheduler's config" and found.sources["guidance"] == "option"
    assert found.sources["plans"].startswith("option steps")


def test_a_folder_may_be_read_as_an_entry_of_the_catalogue(folders: dict[str, Path]) -> None:
    student = student_of(folders["ddim"], ModelOptions(entry="sdxl-turbo"))
    found = read_student_manifest(student)
    assert sorted(found.plans) == [1, 2, 3, 4] and found.sampler.kind == "ancestral" and found.default_steps == 1
    scheduler = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "EulerAncestralDiscreteScheduler" and scheduler["beta_end"] == 0.012
    with pytest.raises(ImagineFlashError, match="it was trained for no other; --any-steps draws anyway"):
        student_of(folders["ddim"], ModelOptions(entry="sdxl-turbo", steps=(6,)))
    other = student_of(folders["ddim"], ModelOptions(entry="sdxl-turbo", steps=(6,), any_steps=True))
    assert sorted(read_student_manifest(other).plans) == [6]


def test_the_same_is_made_once_and_nothing_is_copied(folders: dict[str, Path], cache: Path) -> None:
    first = student_of(folders["euler"], ModelOptions(steps=(1,)))
    assert student_of(folders["euler"], ModelOptions(steps=(1,))) == first and first.is_relative_to(cache)
    assert (first / "unet" / "diffusion_pytorch_model.safetensors").is_symlink()
    assert student_of(folders["euler"], ModelOptions(steps=(2,))) != first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "does not say for how many steps it was trained: add --steps 4"),
        ({"steps": (0,)}, "between 1 and 999 steps"),
        ({"timesteps": (499, 999)}, "must decrease strictly"),
        ({"timesteps": (1000,)}, "outside the schedule's 0..999"),
        ({"steps": (1,), "sampler": "euler"}, "sampler: "),
        ({"steps": (1,), "prediction": "eps"}, "must be one of epsilon"),
        ({"entry": "sd-turbos"}, "did you mean 'sd-turbo'"),
    ],
)
def test_what_cannot_be_described(folders: dict[str, Path], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ImagineFlashError, match=says) as caught:
        student_of(folders["euler"], ModelOptions(**options))
    assert "\n" not in str(caught.value)


def test_a_scheduler_without_a_closed_form_needs_a_sampler(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = pipelines.build_pipeline()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    pipeline.save_pretrained(tmp_path / "dpm")
    with pytest.raises(ImagineFlashError, match="DPMSolverMultistepScheduler has no closed form"):
        student_of(tmp_path / "dpm", ModelOptions(steps=(4,)))
    found = read_student_manifest(student_of(tmp_path / "dpm", ModelOptions(steps=(4,), sampler="renoise")))
    assert found.plans == {4: [999, 749, 499, 249]} and found.sampler.kind == "renoise"


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not exist|no folder here"):
        student_of(tmp_path / "nowhere", ModelOptions(steps=(1,)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="is no diffusers pipeline"):
        student_of(tmp_path / "empty", ModelOptions(steps=(1,)))
