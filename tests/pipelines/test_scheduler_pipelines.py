"""The scheduler in diffusers' own pipelines, against core's loop over the pipeline's network and conditions."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from imagine_flash.core.errors import PlanError
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.core.update import reference_update, update_table
from imagine_flash.pipelines.scheduler import ImagineFlashScheduler
from imagine_flash.tests.architectures import BUILDERS

OPTIONS: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "sd3": {"max_sequence_length": 16},
}
IMAGE_TO_IMAGE = {
    "sd15": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
}
INPAINTING = {"sd15": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}
PROMPTS = ["a cat", "a fox on a pink background"]
STRENGTHS = [(1, 1.0), (2, 0.5), (2, 1.0), (3, 0.4), (3, 0.7), (3, 1.0)]


@dataclass(frozen=True)
class Case:
    """A pipeline with our scheduler, and what its own scheduler's file says."""

    pipe: Any
    schedule: NoiseSchedule
    prediction: str
    options: dict[str, Any]

    @property
    def network(self) -> Any:
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer

    def set(self, **changes: Any) -> None:
        self.pipe.scheduler = ImagineFlashScheduler.from_config(self.pipe.scheduler.config, **changes)

    def latents(self, pipe: Any = None, **options: Any) -> np.ndarray:
        options = {"prompt": PROMPTS, "guidance_scale": 1.0, "output_type": "latent"} | self.options | options
        return (pipe or self.pipe)(**options).images.numpy()


@cache
def case_of(kind: str, task: str = "") -> Case:
    """The tiny pipeline of that architecture; with a task, the pipeline of that class around the same networks."""
    pipe: Any = BUILDERS[kind]()
    own = pipe.scheduler
    schedule = NoiseSchedule.from_scheduler_config({**own.config, "_class_name": type(own).__name__})
    prediction = "flow" if kind == "sd3" else own.config.prediction_type
    pipe.scheduler = ImagineFlashScheduler.from_config(own.config)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()  # T5 has dropout
    if kind == "sd3":
        pipe.vae.register_to_config(shift_factor=0.1)
    if task:
        pipe = getattr(diffusers, task).from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return Case(pipe, schedule, prediction, OPTIONS.get(kind, {}))


@contextmanager
def asked(network: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each call of the network, by name."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def oracle(
    case: Case,
    call: dict[str, Any],
    x: np.ndarray,
    plan: list[float],
    *,
    noise_correction: bool = True,
    guidance: float | None = None,
    mix: Any = None,
) -> np.ndarray:
    """core's update from x at the first timestep of `plan`, under the conditions of `call`; mix(x_s, i) after a step."""
    table = update_table(case.schedule, StepPlan(tuple(plan)), case.prediction, noise_correction=noise_correction)
    name = "sample" if "sample" in call else "hidden_states"
    for i, t in enumerate(plan):
        x_t = torch.from_numpy(x if guidance is None else np.concatenate([x, x]))
        time = torch.as_tensor(case.schedule.network_time(t)).to(call["timestep"].dtype)
        inputs = {name: x_t, "timestep": time.expand(call["timestep"].shape)}
        m = case.network(**{**call, **inputs})[0].numpy()[:, : x.shape[1]]  # PixArt's other half is a variance
        if guidance is None:
            x = reference_update(x, m, table, i)
        else:
            x = reference_update(x, m[len(x) :], table, i, uncond=m[: len(x)], guidance=guidance)
        x = x if mix is None else mix(x, i)
    return x


def noise_of(case: Case) -> torch.Tensor:
    channels = case.network.config.in_channels
    return torch.randn(len(PROMPTS), channels, 8, 8, generator=torch.Generator().manual_seed(3))


def check(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(expected).all() and expected.std() > 0.1
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise_correction", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart", "pixart PixArtSigmaPipeline", "sd3"])
def test_the_pipeline_draws_as_we_do(kind: str, steps: int, noise_correction: bool) -> None:
    """At one step PixArt's pipeline takes the second thing that a scheduler returns, the estimate of x0."""
    case = case_of(*kind.split())
    case.set(noise_correction=noise_correction)
    noise, plan = noise_of(case), list(StepPlan.trailing(steps))
    with asked(case.network) as calls:
        got = case.latents(num_inference_steps=steps, latents=noise.clone())
    np.testing.assert_allclose([float(c["timestep"].flatten()[0]) for c in calls], case.schedule.network_time(plan))
    check(got, oracle(case, calls[0], noise.numpy(), plan, noise_correction=noise_correction))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart", "sd3"])
def test_guidance(kind: str) -> None:
    case = case_of(kind)
    case.set(noise_correction=True)
    noise = noise_of(case)
    with asked(case.network) as calls:
        got = case.latents(num_inference_steps=3, latents=noise.clone(), guidance_scale=3.0)
    check(got, oracle(case, calls[0], noise.numpy(), [999, 666, 333], guidance=3.0))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart"])
def test_a_students_own_plan(kind: str) -> None:
    case = case_of(kind)
    case.set(noise_correction=True)
    noise = noise_of(case)
    with asked(case.network) as calls:
        got = case.latents(timesteps=[999, 749, 499], latents=noise.clone())
    check(got, oracle(case, calls[0], noise.numpy(), [999, 749, 499]))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart"])
def test_without_noise_correction_the_picture_is_ddims(kind: str, steps: int) -> None:
    """Where the plans are equal; of three steps diffusers' last one starts at 332, ours at 333."""
    case = case_of(kind)
    case.set(noise_correction=False)
    noise, ours = noise_of(case), case.pipe.scheduler
    got = case.latents(num_inference_steps=steps, latents=noise.clone())
    same = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    try:
        case.pipe.scheduler = DDIMScheduler.from_config(ours.config, **same)
        check(got, case.latents(num_inference_steps=steps, latents=noise.clone(), eta=0.0))
    finally:
        case.pipe.scheduler = ours


def test_a_flow_takes_eulers_steps() -> None:
    """x_T is pure noise there, which is what noise correction puts in its place: it changes nothing."""
    case = case_of("sd3")
    case.set(noise_correction=True)
    noise, ours = noise_of(case), case.pipe.scheduler
    got = case.latents(num_inference_steps=3, latents=noise.clone())
    try:
        case.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
        check(got, case.latents(sigmas=[(t + 1) / 1000 for t in (999, 666, 333)], latents=noise.clone()))
    finally:
        case.pipe.scheduler = ours


def encoded(case: Case, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Generator]:
    """Latents of the image and the noise that a pipeline draws after them from seed 5, and a fresh generator of it."""
    generator = torch.Generator().manual_seed(5)
    vae = case.pipe.vae
    with torch.no_grad():
        z = vae.encode(2 * image - 1).latent_dist.sample(generator)
    z = (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return z.numpy(), torch.randn(z.shape, generator=generator).numpy(), generator.manual_seed(5)


def noised(case: Case, z: np.ndarray, noise: np.ndarray, t: float) -> np.ndarray:
    alpha, sigma = case.schedule.at(t)
    return (alpha * z + sigma * noise).astype(np.float32)


def left(kind: str, steps: int, strength: float) -> list[float]:
    """The timesteps that diffusers leaves; Stable Diffusion 3 rounds up."""
    first = int(steps - steps * strength) if kind == "sd3" else steps - int(steps * strength)
    return list(StepPlan.trailing(steps))[first:]


IMAGE = torch.linspace(-9, 9, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).cos().clamp(0, 1)


@pytest.mark.parametrize(("steps", "strength"), STRENGTHS)
@pytest.mark.parametrize("kind", IMAGE_TO_IMAGE)
def test_image_to_image(kind: str, steps: int, strength: float) -> None:
    case = case_of(kind, IMAGE_TO_IMAGE[kind])
    z, noise, generator = encoded(case, IMAGE)
    plan = left(kind, steps, strength)
    options = {"num_inference_steps": steps, "strength": strength, "generator": generator}
    with asked(case.network) as calls:
        got = case.latents(image=IMAGE, **options)
    assert len(calls) == len(plan)
    check(got, oracle(case, calls[0], noised(case, z, noise, plan[0]), plan))


@pytest.mark.parametrize(("steps", "strength"), STRENGTHS)
@pytest.mark.parametrize("kind", INPAINTING)
def test_inpainting(kind: str, steps: int, strength: float) -> None:
    """What is kept is put back after each step, at the noise of the next one: the noise that the correction uses."""
    case = case_of(kind, INPAINTING[kind])
    z, noise, generator = encoded(case, IMAGE)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1.0  # to draw
    drawn, plan = mask[..., ::8, ::8].numpy(), left(kind, steps, strength)

    def mix(x: np.ndarray, i: int) -> np.ndarray:
        kept = noised(case, z, noise, plan[i + 1]) if i + 1 < len(plan) else z
        return (1 - drawn) * kept + drawn * x

    options = {"num_inference_steps": steps, "strength": strength, "generator": generator}
    with asked(case.network) as calls:
        got = case.latents(image=IMAGE, mask_image=mask, height=64, width=64, **options)
    start = noise if strength == 1.0 else noised(case, z, noise, plan[0])
    check(got, oracle(case, calls[0], start, plan, mix=mix))


def test_two_experts_share_the_steps() -> None:
    """SDXL's base stops where its refiner starts, with noise left in the latents."""
    base, refiner = case_of("sdxl"), case_of("sdxl", IMAGE_TO_IMAGE["sdxl"])
    base.set(noise_correction=True)
    noise, steps = noise_of(base), {"num_inference_steps": 3}
    half = torch.from_numpy(base.latents(latents=noise.clone(), denoising_end=0.5, **steps))
    got = refiner.latents(image=half, denoising_start=0.5, **steps)
    check(got, base.latents(latents=noise.clone(), **steps))


@pytest.mark.parametrize(
    ("kind", "task", "options", "error", "message"),
    [
        ("sd15", "", {"num_inference_steps": 0}, PlanError, "a plan has between 1 and 999 steps, got 0"),
        ("pixart", "", {"num_inference_steps": 2.5}, PlanError, "a plan has between 1 and 999 steps, got 2.5"),
        ("sdxl", "", {"timesteps": [499, 749]}, PlanError, r"must decrease strictly, got \[499, 749\]"),
        ("pixart", "", {"timesteps": [1000, 1]}, PlanError, r"timestep 1000 is outside the schedule's 0\.\.999"),
        ("sdxl", "", {"sigmas": [1.0, 0.5]}, ValueError, "does not support custom sigmas"),
        ("sd15", "images", {"strength": 0.3}, PlanError, r"none of 3 step\(s\): it must be at least 0\.34$"),
        ("sdxl", "images", {"strength": 0.0}, PlanError, r"none of 3 step\(s\): it must be at least 0\.34$"),
        ("sd3", "images", {"strength": 0.0}, PlanError, r"none of 3 step\(s\): it must be at least 0\.34$"),
        ("sdxl", "images", {"strength": 0.9, "num_inference_steps": 1}, PlanError, "must be at least 1$"),
        ("sdxl", "inpainting", {"strength": 0.3}, ValueError, "strength parameter: 0.3.* which is < 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(kind: str, task: str, options: Any, error: type, message: str) -> None:
    case = case_of(kind, {"": {}, "images": IMAGE_TO_IMAGE, "inpainting": INPAINTING}[task].get(kind, ""))
    images = {"image": IMAGE} if task else {}
    images |= {"mask_image": torch.ones(1, 1, 64, 64)} if task == "inpainting" else {}
    with pytest.raises(error, match=message) as caught:
        case.latents(**{"num_inference_steps": 3, **images, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart", "sd3"])
def test_a_saved_pipeline_keeps_it(kind: str, tmp_path: Any) -> None:
    case = case_of(kind)
    case.set(noise_correction=False)
    case.pipe.save_pretrained(tmp_path)
    again: Any = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path), local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, ImagineFlashScheduler)
    noise, steps = noise_of(case), {"num_inference_steps": 2}
    check(case.latents(again, latents=noise.clone(), **steps), case.latents(latents=noise.clone(), **steps))
