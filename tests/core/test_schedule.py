"""Tables against their closed forms and against diffusers."""

import json

import numpy as np
import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from imagine_flash.core.errors import ScheduleError
from imagine_flash.core.schedule import NoiseSchedule, rescale_zero_terminal_snr

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("zero_snr", [False, True], ids=["as is", "zero terminal SNR"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("steps", [1000, 50])
def test_tables_equal_diffusers(scheduler_class, beta_schedule, zero_snr, steps):
    config = {"num_train_timesteps": steps, "beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr}
    theirs = scheduler_class(beta_start=0.00085, beta_end=0.012, **config)
    ours = NoiseSchedule.from_scheduler_config(theirs.config)
    np.testing.assert_allclose(ours.alpha**2, theirs.alphas_cumprod.double().numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(ours.alpha**2 + ours.sigma**2, 1.0, rtol=0, atol=1e-12)
    assert (ours.signal_at_T == 0.0) is zero_snr


def test_defaults_and_trained_betas_equal_diffusers():
    betas = np.linspace(0.001, 0.3, 7).tolist()
    for theirs in (DDIMScheduler(), DDPMScheduler(num_train_timesteps=7, trained_betas=betas)):
        ours = NoiseSchedule.from_scheduler_config(theirs.config)
        np.testing.assert_allclose(ours.alpha**2, theirs.alphas_cumprod.double().numpy(), rtol=0, atol=1e-6)
    bare = NoiseSchedule.from_scheduler_config({"_class_name": "DDIMScheduler"})
    np.testing.assert_array_equal(bare.alpha, NoiseSchedule.from_scheduler_config(DDIMScheduler().config).alpha)


def test_a_flow_config_without_its_class_name_is_not_taken_for_a_linear_schedule():
    """diffusers leaves _class_name out of `.config`; a table of betas was then made silently for a flow model."""
    with pytest.raises(ScheduleError, match="neither '_class_name' nor 'beta_schedule'"):
        NoiseSchedule.from_scheduler_config(FlowMatchEulerDiscreteScheduler().config)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_and_times_equal_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = NoiseSchedule.from_scheduler_config(json.loads(theirs.to_json_string()))
    assert ours.kind == "flow"
    np.testing.assert_allclose(ours.sigma[::-1], np.asarray(theirs.sigmas), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        ours.network_time(np.arange(1000))[::-1], np.asarray(theirs.timesteps), rtol=0, atol=1e-3
    )
    np.testing.assert_allclose(ours.alpha + ours.sigma, 1.0, rtol=0, atol=1e-15)
    assert ours.signal_at_T == 0.0


def test_the_stable_diffusion_schedule_keeps_some_signal():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    assert schedule.num_train_timesteps == 1000
    assert schedule.signal_at_T == pytest.approx(0.0683, abs=1e-4)


def test_rescaling_keeps_the_first_entry_and_clears_the_last():
    alpha_bar = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION).alpha ** 2
    rescaled = rescale_zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0.0
    assert rescaled[0] == pytest.approx(alpha_bar[0], abs=1e-15)


def test_fractions_lie_on_the_closed_form_of_a_flow_and_where_euler_puts_them_else():
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    flow = NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    u = (np.array([998.5, 0.25]) + 1) / 1000
    np.testing.assert_allclose(flow.at([998.5, 0.25])[1], 3 * u / (1 + 2 * u), rtol=0, atol=1e-15)
    theirs = EulerDiscreteScheduler(**STABLE_DIFFUSION)
    theirs.set_timesteps(8)  # 999, 856.3, 713.6 ...
    alpha, sigma = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION).at(theirs.timesteps.double().numpy())
    np.testing.assert_allclose(sigma / alpha, theirs.sigmas[:-1].double().numpy(), rtol=2e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=0, atol=1e-12)


def test_whole_timesteps_are_exact_among_fractions_too():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION | {"rescale_betas_zero_snr": True})
    alpha, sigma = schedule.at([999, 499.5, 3])
    assert (alpha[0], sigma[0]) == (0.0, 1.0) and (alpha[2], sigma[2]) == (schedule.alpha[3], schedule.sigma[3])
    assert (alpha[1], sigma[1]) == schedule.at(499.5)
    with pytest.raises(ScheduleError, match="has nothing between 998 and 999"):
        schedule.at([999, 998.5, 3])


def test_at_gives_the_exact_entries_in_the_shape_of_t():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    assert schedule.at(999) == (schedule.alpha[999], schedule.sigma[999])
    assert schedule.at(999.0) == schedule.at(999)
    alpha, sigma = schedule.at(np.array([[0, 3], [999, 500]]))
    assert alpha.shape == sigma.shape == (2, 2)
    assert alpha[1, 0] == schedule.alpha[999]
    np.testing.assert_array_equal(schedule.network_time([7, 8]), [7.0, 8.0])


def test_flow_lies_between_its_entries():
    schedule = NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    alpha, sigma = schedule.at(499.5)
    assert (alpha, sigma) == pytest.approx((0.4995, 0.5005), abs=1e-12)


def test_tables_cannot_be_written():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    with pytest.raises(ValueError, match="read-only"):
        schedule.alpha[0] = 1.0


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
BAD_CONFIGS = [
    ({}, "neither '_class_name' nor 'beta_schedule'"),
    ({"beta_schedule": "linear", "use_flow_sigmas": True}, "use_flow_sigmas is not supported"),
    ({"beta_schedule": "scaled_linaer"}, "got 'scaled_linaer'; did you mean 'scaled_linear'?"),
    ({"beta_schedule": "sigmoid"}, "must be one of linear, scaled_linear, squaredcos_cap_v2, got 'sigmoid'"),
    ({"num_train_timesteps": 0}, "whole number >= 1, got 0"),
    ({"num_train_timesteps": "many"}, "whole number >= 1, got 'many'"),
    ({"num_train_timesteps": True}, "whole number >= 1, got True"),
    ({"trained_betas": [0.1, 0.2]}, "must hold num_train_timesteps = 1000 values, got 2"),
    ({"trained_betas": ["a"]}, "trained_betas must hold numbers, got ['a']"),
    ({"beta_schedule": "linear", "beta_start": None}, "beta_start must be a number > 0, got None"),
    ({"beta_schedule": "scaled_linear", "beta_end": "0.012"}, "beta_end must be a number > 0, got '0.012'"),
    ({"beta_schedule": "scaled_linear", "beta_start": -0.1}, "beta_start must be a number > 0, got -0.1"),
    ({"num_train_timesteps": 2, "trained_betas": [0.1, 1.2]}, "betas must be in (0, 1], got 0.1 to 1.2"),
    ({"_class_name": "LCMScheduler", "beta_end": 0.02}, "LCMScheduler has no 'beta_schedule'"),
    ({"_class_name": "FlowMatchMineScheduler"}, "unknown flow scheduler 'FlowMatchMineScheduler'"),
    (FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting is not supported"),
    (FLOW | {"shift": 0}, "shift must be a number > 0, got 0"),
    (FLOW | {"shift": "big"}, "shift must be a number > 0, got 'big'"),
    ({"num_train_timesteps": 1, "beta_schedule": "linear", "rescale_betas_zero_snr": True}, "at least two timesteps"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_bad_configs(config, message):
    with pytest.raises(ScheduleError) as caught:
        NoiseSchedule.from_scheduler_config(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("t", [-1, 1000, float("nan"), [3, 1000], 999.5])
def test_timesteps_outside_the_table(t):
    with pytest.raises(ScheduleError, match=r"0\.\.999|between 0 and 999"):
        NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION).at(t)


@pytest.mark.parametrize(
    ("alpha", "sigma", "kind"),
    [
        ([0.5], [0.5], "variance_preserving"),
        ([1.0, 0.6], [0.0], "flow"),
        ([], [], "flow"),
        ([1.5], [-0.5], "flow"),
        ([0.6], [0.8], "exploding"),
    ],
)
def test_tables_that_are_no_schedule(alpha, sigma, kind):
    with pytest.raises(ScheduleError):
        NoiseSchedule(np.array(alpha), np.array(sigma), kind)
