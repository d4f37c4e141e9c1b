"""Plain diffusers folders, without imagine_flash.json: drawn as diffusers' own pipeline draws them with its own scheduler."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError, ImagineFlashError
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.folders.reading import read_student_manifest
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.tests import architectures, pipelines

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAILING: dict[str, Any] = SD | {"timestep_spacing": "trailing"}
SCHEDULERS: dict[str, Any] = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**TRAILING),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**TRAILING),
    "ddim": lambda: diffusers.DDIMScheduler(**TRAILING, clip_sample=False, set_alpha_to_one=False),
    "lcm": lambda: diffusers.LCMScheduler(**SD),
    "tcd": lambda: diffusers.TCDScheduler(**SD),
}


def saved(pipeline: Any, folder: Path) -> Path:
    """As diffusers saves it."""
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipeline with each of these schedulers, as diffusers saves it."""
    found, root = {}, tmp_path_factory.mktemp("plain")
    pipeline = pipelines.build_pipeline()
    for name, build in SCHEDULERS.items():
        pipeline.scheduler = build()
        found[name] = saved(pipeline, root / name)
    found["told"] = saved(architectures.build_lcm(), root / "told")
    found["told xl"] = saved(architectures.told_guidance(architectures.build_sdxl()), root / "told-xl")
    for name in ("flux", "sana"):
        found[name] = saved(architectures.DRAWN[name](), root / name)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def diffusers_picture(
    folder: Path, steps: int, guidance: float, monkeypatch: pytest.MonkeyPatch, vae: Any = None, prompt: str = "a cat"
) -> np.ndarray:
    """The pipeline's own picture from our noises; with another decoder where one is given."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = pipeline.vae if vae is None else vae
    is_sana = isinstance(pipeline, diffusers.SanaSprintPipeline)
    shape = (4, 2, 2) if is_sana else (4, 8, 8)
    draws = iter([torch.from_numpy(step_noise(7, 1, shape, i + 1)) for i in range(steps)])
    module = type(pipeline.scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(draws), raising=False)
    latents = torch.from_numpy(step_noise(7, 1, shape, 0))
    given: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "latents": latents,
        "output_type": "np",
    }
    if isinstance(pipeline, diffusers.FluxPipeline):
        packed = pipeline._pack_latents(latents, 1, 4, 8, 8)
        given |= {"latents": packed, "height": 64, "width": 64, "max_sequence_length": 256}
    if is_sana:
        given |= {"height": 64, "width": 64, "use_resolution_binning": False}
        given |= {} if steps == 2 else {"intermediate_timesteps": None}
    drawn: Any = pipeline(prompt, **given)
    return (drawn.images[0] * 255).round().astype(np.uint8)


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


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("name", "entry"), [("flux", "flux.1-schnell"), ("sana", "sana-sprint-0.6b")])
def test_transformers_are_drawn_as_diffusers_draws_them(
    folders: dict[str, Path], name: str, entry: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a Cat on a pink background"
    student = student_of(folders[name], ModelOptions(entry=entry))
    with Engine.load(student, backend="torch", sizes=[(64, 64)]) as engine:
        got = engine.generate(GenerateRequest(prompt=prompt, steps=steps, seed=7))
    expected = diffusers_picture(folders[name], steps, got.guidance, monkeypatch, prompt=prompt)
    assert psnr(got.images[0], expected) >= 45


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["told", "told xl"])
def test_a_network_that_is_told_its_guidance(
    folders: dict[str, Path], name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is a request's, the model's own without: never a second row, nor a negative prompt."""
    student = student_of(folders[name], ModelOptions(steps=(steps,), guidance=8.0))
    with Engine.load(student, backend="torch") as engine:
        for guidance in (None, 2.0):
            got = engine.generate(GenerateRequest(prompt="a cat", steps=steps, seed=7, guidance=guidance))
            expected = diffusers_picture(folders[name], steps, guidance or 8.0, monkeypatch)
            assert psnr(got.images[0], expected) >= 45
        assert engine.stats().batches == {1: 2 * steps}
        with pytest.raises(ImagineFlashError, match="it is told its guidance"):
            engine.generate(GenerateRequest(prompt="a cat", negative_prompt="a dog"))


@pytest.mark.parametrize("name", ["euler", "told xl"])
def test_a_tiny_decoder_is_diffusers_own(
    folders: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = pipelines.build_vae("tiny", 16)
    options = ModelOptions(steps=(1,), guidance=1.0, tiny_decoder=str(saved(tiny, tmp_path / "tiny")))
    student = student_of(folders[name], options)
    assert read_student_manifest(student).sources["decoder"] == f"{tmp_path / 'tiny'}, a tiny one"
    with Engine.load(student, backend="torch") as engine:
        got = engine.generate(GenerateRequest(prompt="a cat", steps=1, seed=7)).images[0]
    assert psnr(got, diffusers_picture(folders[name], 1, 1.0, monkeypatch, tiny)) >= 45
    assert psnr(got, diffusers_picture(folders[name], 1, 1.0, monkeypatch)) < 45


def test_the_catalogues_tiny_decoder_is_taken_where_it_can_be_had(folders: dict[str, Path]) -> None:
    """There is no network in the tests: the model's own, which is said."""
    student = student_of(folders["euler"], ModelOptions(entry="sd-turbo", prefer_tiny=True))
    said = read_student_manifest(student).sources["decoder"]
    assert said.startswith("the model's own; the tiny one is not here: madebyollin/taesd is no folder here")


def test_the_scale_of_a_network_that_says_none(folders: dict[str, Path]) -> None:
    found = read_student_manifest(student_of(folders["told"], ModelOptions(steps=(4,))))
    assert found.guidance.default == 8.5 and found.guidance.embedded
    assert found.sources["guidance"].startswith("diffusers' pipeline")
    found = read_student_manifest(student_of(folders["told"], ModelOptions(entry="lcm-dreamshaper-v7")))
    assert found.guidance.default == 8.0 and found.guidance.embedded and found.default_steps == 4


@pytest.mark.parametrize(("name", "pipeline", "scale"), [("sana", "SanaSprint", 4.5), ("flux", "Flux", 3.5)])
def test_the_scale_that_a_transformer_is_told(
    folders: dict[str, Path], name: str, pipeline: str, scale: float, tmp_path: Path
) -> None:
    """By its path, or an id that the catalogue does not have: it was 1."""
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": True}))  # as FLUX.1-dev's
    found = read_student_manifest(student_of(folder, ModelOptions(steps=(2,))))
    assert found.guidance.default == scale and found.guidance.embedded
    assert found.sources["guidance"] == f"diffusers' pipeline {pipeline}Pipeline, by default"
    assert read_student_manifest(student_of(folder, ModelOptions(steps=(2,), guidance=2.0))).guidance.default == 2.0


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


@pytest.mark.parametrize("sampler", [None, "renoise"])
def test_a_scheduler_that_does_not_say_its_class(
    folders: dict[str, Path], tmp_path: Path, sampler: Literal["renoise"] | None
) -> None:
    """The index says it, which is what diffusers goes by; with --sampler, which the error advised, it was a KeyError."""
    folder = Path(shutil.copytree(folders["euler"], tmp_path / "unsaid"))
    config = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in values.items() if key != "_class_name"}))
    student = student_of(folder, ModelOptions(steps=(2,), sampler=sampler))
    assert json.loads((student / "scheduler" / "scheduler_config.json").read_text()) == values
    assert read_student_manifest(student).sampler.kind == (sampler or "deterministic")
    index = folder / "model_index.json"
    index.write_text(
        json.dumps({key: value for key, value in json.loads(index.read_text()).items() if key != "scheduler"})
    )
    with pytest.raises(ArtifactError, match=r"scheduler_config\.json has no _class_name; add it, such as"):
        student_of(folder, ModelOptions(steps=(2,), sampler=sampler))


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not exist|no folder here"):
        student_of(tmp_path / "nowhere", ModelOptions(steps=(1,)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="is no diffusers pipeline"):
        student_of(tmp_path / "empty", ModelOptions(steps=(1,)))
