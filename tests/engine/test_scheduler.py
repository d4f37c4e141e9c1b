"""Our sampler inside diffusers' own pipelines: the pictures are those of the sampler outside them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionImg2ImgPipeline

from imagine_flash.core.errors import PlanError, ScheduleError
from imagine_flash.core.noise import initial_noise
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.update import update_table
from imagine_flash.distill.networks import load_networks
from imagine_flash.engine.scheduler import ImagineFlashScheduler


def scheduler_of(config: Any, **changes: Any) -> Any:
    return ImagineFlashScheduler.from_config(config, **changes)


@pytest.fixture(scope="module")
def pipeline(tiny_student: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(str(tiny_student), dtype=torch.float32, local_files_only=True)
    pipe.scheduler = scheduler_of(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: Any, steps: int, noise: torch.Tensor, **more: Any) -> np.ndarray:
    options: dict[str, Any] = {"guidance_scale": 1.0, "output_type": "latent", "latents": noise.clone(), **more}
    return pipe(["a cat"] * len(noise), num_inference_steps=steps, **options).images.numpy()


@pytest.mark.parametrize("noise_correction", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_pipeline_samples_as_we_do(pipeline: Any, tiny_student: Path, steps: int, noise_correction: bool) -> None:
    networks = load_networks(tiny_student)
    noise = torch.from_numpy(initial_noise(7, 2, networks.latent_shape))
    pipeline.scheduler = scheduler_of(pipeline.scheduler.config, noise_correction=noise_correction)
    plan = StepPlan.trailing(steps)
    table = update_table(networks.schedule, plan, networks.prediction_type, noise_correction=noise_correction)
    expected = networks.sample(noise, networks.embed(["a cat"] * 2), table).numpy()
    np.testing.assert_allclose(latents_of(pipeline, steps, noise), expected, rtol=0, atol=2e-5)
    assert pipeline.scheduler.timesteps.tolist() == list(plan)


def test_without_noise_correction_it_is_ddim(pipeline: Any) -> None:
    """Where the plans meet: from 999 to 666 and from 666 to 333; diffusers' own last step starts at 332."""
    ours = scheduler_of(pipeline.scheduler.config, noise_correction=False)
    ddim: Any = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    ours.set_timesteps(3)
    ddim.set_timesteps(3)
    x, m = (torch.from_numpy(initial_noise(seed, 2, (4, 8, 8))) for seed in (1, 2))
    for t in (999, 666):
        a, b = ours.step(m, t, x, return_dict=False)[0], ddim.step(m, t, x, eta=0.0, return_dict=False)[0]  # type: ignore[index]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_its_config_survives_a_folder(pipeline: Any, tmp_path: Path) -> None:
    scheduler = scheduler_of(pipeline.scheduler.config, noise_correction=False)
    scheduler.save_pretrained(str(tmp_path))
    again: Any = ImagineFlashScheduler.from_pretrained(str(tmp_path))
    assert dict(again.config)["noise_correction"] is False
    assert again.schedule.alpha[-1] == scheduler.schedule.alpha[-1]


def test_image_to_image_starts_at_a_later_step(pipeline: Any) -> None:
    """With strength 0.4, 0.7 and 1 there are one, two and three steps left of three."""
    parts = {
        k: v
        for k, v in pipeline.components.items()
        if k not in ("safety_checker", "feature_extractor", "image_encoder")
    }
    build: Any = StableDiffusionImg2ImgPipeline
    pipe = build(
        **parts,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    start = torch.zeros(1, 3, 64, 64)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
    images = [
        pipe("a cat", image=start, strength=s, generator=torch.Generator().manual_seed(0), **options).images
        for s in (0.4, 0.7, 1.0)
    ]
    assert all(np.isfinite(image).all() and image.shape == (1, 64, 64, 3) for image in images)
    assert not np.allclose(images[0], images[2])


def test_add_noise_is_the_forward_process(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    x0, eps = (torch.from_numpy(initial_noise(seed, 2, (4, 8, 8))) for seed in (1, 2))
    noisy = scheduler.add_noise(x0, eps, torch.tensor([999, 333]))
    for row, t in enumerate((999, 333)):
        alpha, sigma = (float(v) for v in scheduler.schedule.at(t))
        torch.testing.assert_close(noisy[row], alpha * x0[row] + sigma * eps[row])


def test_half_precision_stays_half_precision(pipeline: Any) -> None:
    scheduler = scheduler_of(pipeline.scheduler.config)
    scheduler.set_timesteps(timesteps=[999, 500])
    x = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)
    step: Any = scheduler.step(x, torch.tensor(500), x)
    assert step.prev_sample.dtype == torch.bfloat16 and step.prev_sample.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.set_timesteps(0), PlanError, "between 1 and 999 steps, got 0"),
        (lambda s: s.set_timesteps(), PlanError, "give num_inference_steps or timesteps"),
        (lambda s: s.set_timesteps(timesteps=[1, 5]), PlanError, "timesteps must decrease strictly"),
        (lambda s: s.set_timesteps(timesteps=[1000]), PlanError, r"timestep 1000 is outside the schedule's 0\.\.999"),
        (
            lambda s: (s.set_timesteps(2), s.step(torch.ones(1, 1), 5, torch.ones(1, 1))),
            ScheduleError,
            r"timestep 5 is not in the plan \[999, 499\]",
        ),
        (
            lambda s: ImagineFlashScheduler(rescale_betas_zero_snr=True),
            ScheduleError,
            "epsilon prediction has no x0 at alpha_t = 0",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(pipeline: Any, call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(scheduler_of(pipeline.scheduler.config))
