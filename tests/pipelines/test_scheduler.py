"""Our sampler inside diffusers' own pipelines: the pictures are those of the sampler outside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from imagine_flash.core.errors import PlanError, ScheduleError
from imagine_flash.core.noise import initial_noise
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.prediction import x0_and_eps
from imagine_flash.core.update import update_table
from imagine_flash.distill.models import load_model
from imagine_flash.pipelines.scheduler import ImagineFlashScheduler


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
def test_the_pipeline_samples_as_we_do(
    pipeline: Any, tiny_student: Path, steps: int, noise_correction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_student)
    noise = torch.from_numpy(initial_noise(7, 2, model.latent_shape))
    own = scheduler_of(pipeline.scheduler.config, noise_correction=noise_correction)
    monkeypatch.setattr(pipeline, "scheduler", own)
    plan = StepPlan.trailing(steps)
    table = update_table(model.denoiser.schedule, plan, model.stages.prediction_type, noise_correction=noise_correction)
    expected = model.sample(noise, model.embed(["a cat"] * 2), table).numpy()
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


def test_a_step_also_gives_the_x0_that_it_implies(pipeline: Any) -> None:
    scheduler = scheduler_of(pipeline.scheduler.config)
    scheduler.set_timesteps(2)
    x, m = (torch.from_numpy(initial_noise(seed, 2, (4, 8, 8))) for seed in (1, 2))
    for t in (999, 499):
        x_s, x0 = scheduler.step(m, t, x, return_dict=False)
        expected, _ = x0_and_eps("v_prediction", x, m, *(float(v) for v in scheduler.schedule.at(t)))
        torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_s, x0, rtol=0, atol=0)
    assert scheduler.step(m, 999, x).pred_original_sample is not None


EXPLICIT = {
    "beta_start": 0.001,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "num_train_timesteps": 500,
    "rescale_betas_zero_snr": True,
}


@pytest.mark.parametrize("settings", [{}, EXPLICIT], ids=["defaults", "explicit"])
@pytest.mark.parametrize("build", [DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, DPMSolverMultistepScheduler])
def test_it_keeps_the_schedule_of_another(build: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """diffusers drops what a config left to its class's default, and two of these classes have other defaults than ours."""
    other = build(**settings)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": build.__name__, **settings}))
    from_file: Any = ImagineFlashScheduler.from_pretrained(str(tmp_path))
    for ours in (scheduler_of(other.config), from_file, scheduler_of(from_file.config)):
        np.testing.assert_allclose(ours.alphas_cumprod, other.alphas_cumprod, rtol=0, atol=2e-6)
        assert ours.config.prediction_type == other.config.prediction_type
    back = build.from_config(scheduler_of(other.config).config)
    assert {key: back.config[key] for key in settings} == settings


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}])
def test_it_keeps_the_shift_of_a_flow(settings: dict[str, Any], tmp_path: Path) -> None:
    other: Any = FlowMatchEulerDiscreteScheduler(**settings)
    other.save_pretrained(str(tmp_path))
    from_file: Any = ImagineFlashScheduler.from_pretrained(str(tmp_path))
    for ours in (scheduler_of(other.config), from_file, scheduler_of(from_file.config)):
        assert ours.schedule.kind == "flow"
        np.testing.assert_allclose(ours.schedule.sigma[::-1], other.sigmas, rtol=0, atol=1e-6)
        ours.set_timesteps(3)
        np.testing.assert_allclose(ours.timesteps, other.timesteps[[0, 333, 666]], rtol=1e-6)


def test_a_flow_takes_diffusers_own_times() -> None:
    """They are what the network is told, T sigma, between the entries of the table; each step is diffusers' own."""
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(4)
    ours = scheduler_of(theirs.config, noise_correction=False)
    ours.set_timesteps(timesteps=theirs.timesteps)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
    x = y = torch.from_numpy(initial_noise(1, 1, (4, 8, 8)))
    for i, (mine, other) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        m = torch.from_numpy(initial_noise(10 + i, 1, (4, 8, 8)))
        x, y = ours.step(m, mine, x).prev_sample, theirs.step(m, other, y).prev_sample
        torch.testing.assert_close(x, y)
    for times in ([1000.5, 3], [500, 0.0]):
        with pytest.raises(PlanError, match=r"the time of a flow must be in \(0, 1000\]"):
            ours.set_timesteps(timesteps=times)


RENOISING = [
    (LCMScheduler, {"clip_sample": False, "original_inference_steps": 3}, {"kind": "renoise", "boundary": 10.0}),
    (FlowMatchLCMScheduler, {"shift": 3.0}, {"kind": "renoise"}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": True}, {"kind": "renoise"}),
]


@pytest.mark.parametrize("says", [True, False], ids=["its sampler", "its class alone"])
@pytest.mark.parametrize(("build", "settings", "sampler"), RENOISING)
def test_a_student_that_renoises_is_renoised(
    build: Any, settings: dict[str, Any], sampler: dict[str, Any], says: bool, tmp_path: Path
) -> None:
    """Its config was taken, and its steps made deterministic: now they are its stock scheduler's, from the same generator."""
    theirs = build(**settings)
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ({"sampler": sampler} if says else {})))
    loaded = build.from_pretrained(str(tmp_path))
    ours = scheduler_of(loaded.config)
    assert ours.sampler.model_dump(exclude_unset=True) == sampler
    theirs.set_timesteps(3)
    ours.set_timesteps(timesteps=theirs.timesteps)
    x = y = torch.from_numpy(initial_noise(1, 2, (4, 8, 8)))
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    for i, (t, s) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        m = torch.from_numpy(initial_noise(10 + i, 2, (4, 8, 8)))
        x, y = ours.step(m, t, x, generator=one).prev_sample, theirs.step(m, s, y, generator=other).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_pipelines_generator_draws_the_noise(pipeline: Any) -> None:
    noise = torch.from_numpy(initial_noise(7, 2, (4, 8, 8)))
    before, pipeline.scheduler = (
        pipeline.scheduler,
        scheduler_of(pipeline.scheduler.config, sampler={"kind": "renoise"}),
    )
    drawn = [latents_of(pipeline, 2, noise, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    pipeline.scheduler = before
    assert np.array_equal(drawn[0], drawn[1]) and not np.allclose(drawn[0], drawn[2], atol=1e-2)


def test_its_config_survives_a_folder(pipeline: Any, tmp_path: Path) -> None:
    scheduler = scheduler_of(pipeline.scheduler.config, noise_correction=False)
    scheduler.save_pretrained(str(tmp_path))
    again: Any = ImagineFlashScheduler.from_pretrained(str(tmp_path))
    assert dict(again.config)["noise_correction"] is False
    assert again.schedule.alpha[-1] == scheduler.schedule.alpha[-1]


def test_add_noise_is_the_forward_process(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    x0, eps = (torch.from_numpy(initial_noise(seed, 2, (4, 8, 8))) for seed in (1, 2))
    noisy = scheduler.add_noise(x0, eps, torch.tensor([999, 333]))
    for row, t in enumerate((999, 333)):
        alpha, sigma = (float(v) for v in scheduler.schedule.at(t))
        torch.testing.assert_close(noisy[row], alpha * x0[row] + sigma * eps[row])


def test_it_is_what_diffusers_expects_of_a_scheduler(pipeline: Any) -> None:
    """The fourth argument of `step` is eta, there are betas, and no compatible scheduler is a flow, which has none."""
    ours = scheduler_of(pipeline.scheduler.config)
    ours.set_timesteps(2)
    m, x = (torch.from_numpy(initial_noise(seed, 1, (4, 8, 8))) for seed in (1, 2))
    assert torch.equal(ours.step(m, 999, x, 0.0).prev_sample, ours.step(m, 999, x).prev_sample)
    with pytest.raises(ScheduleError, match=r"eta must be 0, got 0\.5"):
        ours.step(m, 999, x, 0.5)
    stock: Any = DDIMScheduler.from_config(ours.config)
    torch.testing.assert_close(ours.betas, stock.betas)
    trained = np.linspace(1e-4, 0.02, 1000).tolist()
    torch.testing.assert_close(ImagineFlashScheduler(trained_betas=trained).betas, torch.tensor(trained).float())
    assert DDIMScheduler in ours.compatibles
    assert not [other for other in ours.compatibles if other.__name__.startswith("FlowMatch")]


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
        (lambda s: s.set_timesteps(2.5), PlanError, "between 1 and 999 steps, got 2.5"),
        (lambda s: s.set_timesteps(timesteps=[]), PlanError, "a plan needs at least one timestep"),
        (lambda s: s.set_timesteps(timesteps=[-1]), PlanError, "a timestep must be a number >= 0, got -1"),
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
        (
            lambda s: scheduler_of(s.config, prediction_type="v-prediction"),
            ScheduleError,
            "got 'v-prediction'; did you",
        ),
        (
            lambda s: scheduler_of(s.config, prediction_type="flow"),
            ScheduleError,
            "flow prediction needs a flow schedule",
        ),
        (
            lambda s: scheduler_of(s.config, sampler={"kind": "renoised"}),
            ScheduleError,
            "sampler .*renoised.*: Input should be 'deterministic'",
        ),
        (lambda s: scheduler_of({}), ScheduleError, "neither '_class_name' nor 'beta_schedule'"),
        (lambda s: scheduler_of({"_class_name": "EDMEulerScheduler"}), ScheduleError, "EDMEulerScheduler has no"),
        (
            lambda s: scheduler_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config),
            ScheduleError,
            "use_dynamic_shifting is not supported.*set a fixed shift",
        ),
        (
            lambda s: scheduler_of(DPMSolverMultistepScheduler(use_flow_sigmas=True).config),
            ScheduleError,
            "use_flow_sigmas is not supported; use a FlowMatchEulerDiscreteScheduler config",
        ),
        (
            lambda s: scheduler_of(EulerDiscreteScheduler(timestep_type="continuous").config),
            ScheduleError,
            "timestep_type='continuous' is not supported",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(pipeline: Any, call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(scheduler_of(pipeline.scheduler.config))
    assert "\n" not in str(caught.value)


def test_a_refused_plan_leaves_the_former_one(pipeline: Any) -> None:
    scheduler = scheduler_of(pipeline.scheduler.config)
    scheduler.set_timesteps(timesteps=torch.tensor([999, 500]))
    with pytest.raises(PlanError):
        scheduler.set_timesteps(timesteps=np.array([1000, 500]))
    assert scheduler.timesteps.tolist() == [999, 500] and scheduler.num_inference_steps == 2


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_a_layout_changes_nothing(pipeline: Any, layout: str) -> None:
    scheduler = scheduler_of(pipeline.scheduler.config)
    x, m = (torch.from_numpy(initial_noise(seed, 2, (4, 8, 8))) for seed in (1, 2))
    if layout == "channels_last":
        other = x.contiguous(memory_format=torch.channels_last)
    else:
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    a, b = (scheduler.step(m, 999, v).prev_sample for v in (x, other))
    torch.testing.assert_close(a, b)
