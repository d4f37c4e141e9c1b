"""Every sampler against diffusers' own scheduler: the same network, start and noises, float64, 1e-6."""

import functools
import inspect
import json
import math
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from imagine_flash.core.diffusers_samplers import plan_of, sampler_of
from imagine_flash.core.errors import PlanError, ScheduleError
from imagine_flash.core.sampler import Sampler
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.core.update import sample, update_table

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim leading": ("DDIMScheduler", SD | {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    "ddim trailing": ("DDIMScheduler", SD | {"clip_sample": False, "timestep_spacing": "trailing"}),
    "euler trailing": ("EulerDiscreteScheduler", SD | {"timestep_spacing": "trailing"}),
    "euler leading": ("EulerDiscreteScheduler", SD | {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler linspace": ("EulerDiscreteScheduler", SD),
    "ancestral": ("EulerAncestralDiscreteScheduler", SD | {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", SD),
    "tcd": ("TCDScheduler", SD),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow without shift": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow renoised": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "flow lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "flow stretched": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.02}),
    "flow lcm stretched": ("FlowMatchLCMScheduler", {"shift": 3.0, "shift_terminal": 0.1}),
}
PREDICTIONS = [(name, "flow") for name in SCHEDULERS if name.startswith("flow")]
PREDICTIONS += [(n, p) for n in SCHEDULERS if not n.startswith("flow") for p in ("epsilon", "v_prediction")]
PREDICTIONS += [("ddim trailing", "sample"), ("euler trailing", "sample"), ("lcm", "sample"), ("tcd", "sample")]
SHAPE = (2, 4, 3, 3)


class Draws:
    """diffusers' randn_tensor, giving the noises in our order."""

    def __init__(self, noises: list[np.ndarray]) -> None:
        self.left = [torch.from_numpy(noise) for noise in noises]

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.left.pop(0)


def network(x: np.ndarray, t: float) -> np.ndarray:
    """Neither linear nor the same at all times."""
    return np.tanh(0.7 * x + math.sin(t / 100)) + 0.3 * np.roll(x, 1, axis=1)


def in_double(scheduler: Any) -> Any:
    """With the tables that its float32 ones stand for, so that 1e-6 measures the arithmetic."""
    if hasattr(scheduler, "alphas_cumprod"):
        exact = NoiseSchedule.from_scheduler_config(json.loads(scheduler.to_json_string()))
        scheduler.alphas_cumprod = torch.from_numpy(exact.alpha**2)
        if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def theirs(scheduler: Any, steps: int, draws: list[np.ndarray], module: str, monkeypatch: Any) -> np.ndarray:
    """diffusers' loop, as its pipelines have it."""
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", Draws(draws[1:]), raising=False)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(draws[0]) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = torch.from_numpy(network(given.double().numpy(), float(t)))
        x = scheduler.step(m, t, x, return_dict=False)[0].double()
    return x.numpy()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "prediction"), PREDICTIONS)
def test_each_equals_diffusers(name: str, prediction: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, values = SCHEDULERS[name]
    if steps == 1 and "shift_terminal" in values:  # diffusers divides by zero
        with pytest.raises(ScheduleError, match="needs two steps or more"):
            plan_of({**values, "_class_name": kind}, steps)
        return
    scheduler = in_double(
        getattr(diffusers, kind)(**values, **({} if prediction == "flow" else {"prediction_type": prediction}))
    )
    config = json.loads(scheduler.to_json_string())
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal(SHAPE) for _ in range(steps + 1)]
    expected = theirs(scheduler, steps, draws, type(scheduler).__module__.rsplit(".", 1)[1], monkeypatch)
    schedule, plan = NoiseSchedule.from_scheduler_config(config), plan_of(config, steps)
    table = update_table(schedule, plan, prediction, noise_correction=False, sampler=sampler_of(config))
    found = sample(lambda x, t: network(x, float(schedule.network_time(t))), draws[0], table, noises=draws[1:])
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "prediction", "steps", "share"),
    [
        ("trailing", "epsilon", 3, 0.0018),
        ("trailing", "v_prediction", 3, 0.0022),
        ("trailing", "epsilon", 6, 0.0159),
        ("trailing", "v_prediction", 6, 0.0346),
        ("linspace", "epsilon", 4, 0.806),
        ("leading", "epsilon", 6, 0.0),
    ],
)
def test_ddim_goes_to_the_next_timestep_that_is_visited(
    spacing: str, prediction: str, steps: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers goes from t to t - T // n, wherever it asks next: docs/models.md has these shares of the largest value."""
    values: dict[str, Any] = {"timestep_spacing": spacing, "prediction_type": prediction, "clip_sample": False}
    scheduler = in_double(diffusers.DDIMScheduler(**SD, **values))
    config, rng = json.loads(scheduler.to_json_string()), np.random.default_rng(0)
    draws = [rng.standard_normal(SHAPE) for _ in range(steps + 1)]
    expected = theirs(scheduler, steps, draws, "scheduling_ddim", monkeypatch)
    schedule, plan = NoiseSchedule.from_scheduler_config(config), plan_of(config, steps)
    table = update_table(schedule, plan, prediction, noise_correction=False, sampler=sampler_of(config))
    found = sample(lambda x, t: network(x, t), draws[0], table)
    assert np.abs(found - expected).max() / np.abs(expected).max() == pytest.approx(share, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("steps", [3, 8])
def test_zero_terminal_snr_begins_between_no_two_entries(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It happened that the exact timestep 999 was refused with the fractions of a linspace that follow it. diffusers' signal at
    999 is 2^-12 instead of 0, which is the tolerance."""
    scheduler: Any = diffusers.EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    config, rng = json.loads(scheduler.to_json_string()), np.random.default_rng(3)
    draws = [rng.standard_normal(SHAPE) for _ in range(steps + 1)]
    expected = theirs(scheduler, steps, draws, "scheduling_euler_discrete", monkeypatch)
    schedule, plan = NoiseSchedule.from_scheduler_config(config), plan_of(config, steps)
    table = update_table(schedule, plan, "v_prediction", noise_correction=False, sampler=sampler_of(config))
    found = sample(lambda x, t: network(x, t), draws[0], table)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-12 * np.abs(expected).max())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sana_sprint_is_a_renoised_flow(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipeline turns angles into a flow's times, states and velocities into trigonometric ones, and back at the end."""
    scheduler: Any = diffusers.SCMScheduler()
    rng = np.random.default_rng(1)
    draws = [rng.standard_normal(SHAPE) for _ in range(steps + 1)]
    monkeypatch.setattr("diffusers.schedulers.scheduling_scm.randn_tensor", Draws(draws[1:]))
    scheduler.set_timesteps(steps, max_timesteps=math.pi / 2, intermediate_timesteps=1.3 if steps == 2 else None)
    data, x = scheduler.config.sigma_data, torch.from_numpy(draws[0]) * scheduler.config.sigma_data
    for angle in scheduler.timesteps[:-1].double():
        tau = torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))
        size = torch.sqrt(tau**2 + (1 - tau) ** 2)
        flow = x / data * size
        u = torch.from_numpy(network(flow.numpy(), 1000 * float(tau)))
        m = ((1 - 2 * tau) * flow + (1 - 2 * tau + 2 * tau**2) * u) / size * data
        x, x0 = scheduler.step(m, angle.float(), x, return_dict=False)
    config = json.loads(scheduler.to_json_string())
    schedule, plan = NoiseSchedule.from_scheduler_config(config), plan_of(config, steps)
    table = update_table(schedule, plan, "flow", noise_correction=False, sampler=sampler_of(config))
    found = sample(lambda x, t: network(x, float(schedule.network_time(t))), draws[0], table, noises=draws[1:])
    np.testing.assert_allclose(found, x0.numpy() / data, rtol=2e-6, atol=2e-6)


def test_strategic_sampling_runs_from_deterministic_to_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = in_double(diffusers.TCDScheduler(**SD))
    config, rng = json.loads(scheduler.to_json_string()), np.random.default_rng(2)
    draws = [rng.standard_normal(SHAPE) for _ in range(5)]
    schedule, plan = NoiseSchedule.from_scheduler_config(config), plan_of(config, 4)
    for gamma in (0.0, 0.7, 1.0):
        scheduler.step = functools.partial(diffusers.TCDScheduler.step, scheduler, eta=gamma)
        expected = theirs(scheduler, 4, draws, "scheduling_tcd", monkeypatch)
        sampler = sampler_of(config).model_copy(update={"gamma": gamma})
        table = update_table(schedule, plan, "epsilon", noise_correction=False, sampler=sampler)
        assert bool(table.renoised) == (gamma > 0)
        found = sample(lambda x, t: network(x, t), draws[0], table, noises=draws[1:])
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler has no closed form of one step"),
        ({"_class_name": "LCMSchedular"}, "did you mean 'LCMScheduler'?"),
        ({}, "the scheduler without a class name"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
            "use_karras_sigmas is not supported; choose --sampler deterministic",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}, "ends on a noise level"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "no table of timesteps"),
        ({"_class_name": "DDIMScheduler"}, "clips x0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "log"}, "leading or trailing, got 'log'"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": None}, "timestep_scaling must be a number > 0, got None"),
    ],
)
def test_schedulers_that_are_no_row_of_the_table(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        sampler_of(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("EulerDiscreteScheduler", {"num_train_timesteps": None}, "num_train_timesteps must be a whole number >= 1"),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "leading", "steps_offset": None},
            "steps_offset must be a whole number >= 0, got None",
        ),
        ("LCMScheduler", {"original_inference_steps": "many"}, "original_inference_steps must be a whole number >= 1"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": None}, "shift must be a number > 0, got None"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift_terminal": "low"},
            "shift_terminal must be a number > 0, got 'low'",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 1.0}, "shift_terminal 1 needs two steps or more"),
    ],
)
def test_values_that_are_no_numbers(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        plan_of(values | {"_class_name": name}, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("LCMScheduler", "use_karras_sigmas", True),
        ("TCDScheduler", "final_sigmas_type", "sigma_min"),
        ("DDIMScheduler", "use_beta_sigmas", True),
        ("EulerAncestralDiscreteScheduler", "use_karras_sigmas", True),
        ("EulerDiscreteScheduler", "clip_sample", True),
    ],
)
def test_what_a_class_passes_over_is_passed_over(name: str, key: str, value: Any) -> None:
    """An LCM-LoRA on a base whose scheduler was DPM's with Karras spacing was refused for it."""
    plain = SD | {"_class_name": name} | ({"clip_sample": False} if name == "DDIMScheduler" else {})
    assert key not in inspect.signature(getattr(diffusers, name)).parameters
    assert sampler_of(plain | {key: value}) == sampler_of(plain)
    assert plan_of(plain | {key: value}, 4) == plan_of(plain, 4)


@pytest.mark.parametrize("steps", [0, 1000, True, "four"])
def test_numbers_of_steps_that_are_none(steps: Any) -> None:
    with pytest.raises(PlanError, match="between 1 and 999 steps"):
        plan_of({"_class_name": "EulerDiscreteScheduler"}, steps)
    with pytest.raises(PlanError, match="trained with 50 timesteps, got 51 steps"):
        plan_of({"_class_name": "LCMScheduler"}, 51)


def test_a_flow_has_no_posterior_of_ours() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(ScheduleError, match="a flow has no ancestral sampler"):
        update_table(
            NoiseSchedule.from_scheduler_config(config), plan_of(config, 2), "flow", sampler=Sampler(kind="ancestral")
        )
