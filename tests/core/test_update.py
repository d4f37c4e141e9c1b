"""The update against the closed forms of the mathematics (float64, 1e-9) and against diffusers' DDIM step."""

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from imagine_flash.core.errors import PlanError, ScheduleError
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.prediction import PREDICTION_TYPES
from imagine_flash.core.sampler import Sampler
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.core.update import reference_update, sample, update_table

RENOISE = Sampler(kind="renoise")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "stable diffusion": NoiseSchedule.from_scheduler_config(SD),
    "zero terminal SNR": NoiseSchedule.from_scheduler_config(SD | {"rescale_betas_zero_snr": True}),
    "flow": NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
}
DEFINED = [  # every pair whose closed form exists
    ("stable diffusion", "epsilon"),
    ("stable diffusion", "v_prediction"),
    ("stable diffusion", "sample"),
    ("zero terminal SNR", "v_prediction"),
    ("zero terminal SNR", "sample"),
    ("flow", "sample"),
    ("flow", "flow"),
]
PLANS = [StepPlan.trailing(n) for n in (1, 2, 3, 7)] + [StepPlan((900, 20, 0))]


def denoiser_of(posterior_mean, schedule, prediction_type):
    """The network that knows E[x0 | x_t], in the wanted prediction type."""

    def denoise(x, t):
        alpha, sigma = schedule.at(t)
        x0 = posterior_mean(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[
            prediction_type
        ]

    return denoise


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("noise_correction", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("name", "prediction_type"), DEFINED)
def test_a_point_mass_is_reached_by_any_plan(name, prediction_type, plan, noise_correction):
    schedule, point = SCHEDULES[name], noise(4, 3, 3, seed=1)
    table = update_table(schedule, plan, prediction_type, noise_correction=noise_correction)
    denoise = denoiser_of(lambda x, alpha, sigma: np.broadcast_to(point, x.shape), schedule, prediction_type)
    x0 = sample(denoise, noise(2, 4, 3, 3), table)
    np.testing.assert_allclose(x0, np.broadcast_to(point, x0.shape), rtol=0, atol=1e-9)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_point_mass_is_reached_with_fresh_noise_too(plan):
    schedule, point = SCHEDULES["stable diffusion"], noise(4, seed=1)
    table = update_table(schedule, plan, "v_prediction", sampler=RENOISE)
    assert table.c[-1] == 0.0
    denoise = denoiser_of(lambda x, alpha, sigma: np.broadcast_to(point, x.shape), schedule, "v_prediction")
    x0 = sample(denoise, noise(2, 4), table, noises=[noise(2, 4, seed=i + 2) for i in range(len(plan))])
    np.testing.assert_allclose(x0, np.broadcast_to(point, x0.shape), rtol=0, atol=1e-9)


def gaussian_mean(mean, std):
    """E[x0 | x_t] for x0 ~ N(mean, std^2)."""

    def posterior(x, alpha, sigma):
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return posterior


@pytest.mark.parametrize("noise_correction", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("name", "prediction_type"), DEFINED)
def test_gaussian_data_gives_the_analytic_linear_map(name, prediction_type, plan, noise_correction):
    """For a Gaussian every step is affine in x; here it is followed as (gain, offset) with no UpdateTable at all."""
    schedule, mean, std = SCHEDULES[name], 0.7, 0.4
    gain, offset = 1.0, 0.0
    for i, t in enumerate(plan):
        alpha, sigma = schedule.at(t)
        alpha_s, sigma_s = schedule.at(plan.timesteps[i + 1]) if i + 1 < len(plan) else (1.0, 0.0)
        shrink = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0_gain, x0_offset = shrink * gain, mean + shrink * (offset - alpha * mean)
        eps_gain, eps_offset = (gain - alpha * x0_gain) / sigma, (offset - alpha * x0_offset) / sigma
        if noise_correction and t == 999:
            eps_gain, eps_offset = 1.0, 0.0  # the true noise
        gain, offset = alpha_s * x0_gain + sigma_s * eps_gain, alpha_s * x0_offset + sigma_s * eps_offset
    x_T = noise(3, 4)
    table = update_table(schedule, plan, prediction_type, noise_correction=noise_correction)
    x0 = sample(denoiser_of(gaussian_mean(mean, std), schedule, prediction_type), x_T, table)
    np.testing.assert_allclose(x0, gain * x_T + offset, rtol=0, atol=1e-9)


def test_many_steps_give_gaussian_data_its_mean_and_spread():
    """The probability-flow limit: x0 = mean + std x_T."""
    schedule, mean, std = SCHEDULES["zero terminal SNR"], 0.7, 0.4
    table = update_table(schedule, StepPlan.trailing(999), "v_prediction")
    x_T = noise(3, 4)
    x0 = sample(denoiser_of(gaussian_mean(mean, std), schedule, "v_prediction"), x_T, table)
    np.testing.assert_allclose(x0, mean + std * x_T, rtol=0, atol=5e-3)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("name", "prediction_type"), [("zero terminal SNR", "v_prediction"), ("flow", "flow")])
def test_noise_correction_is_a_no_op_without_signal_at_T(name, prediction_type, plan):
    on, off = (update_table(SCHEDULES[name], plan, prediction_type, noise_correction=c) for c in (True, False))
    np.testing.assert_allclose(on.a, off.a, rtol=0, atol=1e-12)
    np.testing.assert_allclose(on.b, off.b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plan", [StepPlan((999,)), StepPlan((998, 500))], ids=["one step", "not from T"])
@pytest.mark.parametrize(("name", "prediction_type"), DEFINED)
def test_noise_correction_is_a_no_op_for_these_plans(name, prediction_type, plan):
    on, off = (update_table(SCHEDULES[name], plan, prediction_type, noise_correction=c) for c in (True, False))
    np.testing.assert_array_equal(on.a, off.a)
    np.testing.assert_array_equal(on.b, off.b)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_correction_changes_the_first_step_by_the_closed_form(prediction_type):
    """By sigma_s [alpha_T x0 - (1 - sigma_T) x_T] / sigma_T, and no later step by anything."""
    schedule, plan = SCHEDULES["stable diffusion"], StepPlan.trailing(3)
    on, off = (update_table(schedule, plan, prediction_type, noise_correction=c) for c in (True, False))
    x_T, m = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    alpha_T, sigma_T = schedule.at(999)
    _, sigma_s = schedule.at(666)
    x0 = reference_update(x_T, m, update_table(schedule, StepPlan((999,)), prediction_type), 0)
    change = reference_update(x_T, m, on, 0) - reference_update(x_T, m, off, 0)
    np.testing.assert_allclose(change, sigma_s * (alpha_T * x0 - (1 - sigma_T) * x_T) / sigma_T, rtol=0, atol=1e-9)
    assert np.abs(change).max() > 1e-3
    np.testing.assert_array_equal(on.a[1:], off.a[1:])
    np.testing.assert_array_equal(on.b[1:], off.b[1:])


@pytest.mark.parametrize("zero_snr", [False, True], ids=["as is", "zero terminal SNR"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_deterministic_steps_equal_ddim(prediction_type, zero_snr):
    if zero_snr and prediction_type == "epsilon":
        with pytest.raises(ScheduleError):
            update_table(SCHEDULES["zero terminal SNR"], StepPlan.trailing(3), "epsilon")
        return
    theirs = DDIMScheduler(**SD, rescale_betas_zero_snr=zero_snr, prediction_type=prediction_type, clip_sample=False)
    theirs.set_timesteps(3)  # makes its step from t go to t - 333
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    alpha_bar = theirs.alphas_cumprod.numpy()
    exact = NoiseSchedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))  # their float32 table, so that 1e-9 is fair
    x, m = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    for plan in (StepPlan((999, 666)), StepPlan((666, 333)), StepPlan((332,))):
        state = torch.from_numpy(m), int(plan.timesteps[0]), torch.from_numpy(x)
        stepped = theirs.step(*state, eta=0.0, return_dict=False)[0].numpy()
        ours = reference_update(x, m, update_table(exact, plan, prediction_type, noise_correction=False), 0)
        np.testing.assert_allclose(ours, stepped, rtol=0, atol=1e-9)


def test_images_at_different_steps_share_one_call():
    table = update_table(SCHEDULES["stable diffusion"], StepPlan.trailing(3), "v_prediction")
    x, m = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    together = reference_update(x, m, table, np.array([2, 0, 1]))
    for row, step in enumerate([2, 0, 1]):
        np.testing.assert_array_equal(
            together[row], reference_update(x[row : row + 1], m[row : row + 1], table, step)[0]
        )


def test_guidance_is_the_line_through_both_predictions():
    table = update_table(SCHEDULES["stable diffusion"], StepPlan.trailing(2), "v_prediction")
    x, cond, uncond = (noise(2, 4, 2, 2, seed=i) for i in range(3))
    per_image = reference_update(x, cond, table, 0, uncond=uncond, guidance=[1.0, 3.0])
    np.testing.assert_allclose(per_image[0], reference_update(x, cond, table, 0)[0], rtol=0, atol=1e-12)
    guided = uncond + 3.0 * (cond - uncond)
    np.testing.assert_allclose(per_image[1], reference_update(x, guided, table, 0)[1], rtol=0, atol=1e-12)
    with pytest.raises(ScheduleError, match="both uncond and guidance"):
        reference_update(x, cond, table, 0, guidance=2.0)


def test_the_result_has_the_dtype_of_x_and_is_rounded_once():
    table = update_table(SCHEDULES["stable diffusion"], StepPlan.trailing(2), "v_prediction")
    x, m = noise(2, 4).astype(np.float32), noise(2, 4, seed=1).astype(np.float16)
    x_s = reference_update(x, m, table, 0)
    assert x_s.dtype == np.float32
    exact = reference_update(x.astype(np.float64), m, table, 0)
    np.testing.assert_array_equal(x_s, exact.astype(np.float32))


def test_renoising_is_alpha_x0_plus_sigma_z():
    schedule = SCHEDULES["stable diffusion"]
    table = update_table(schedule, StepPlan.trailing(2), "epsilon", sampler=RENOISE)
    x, m, z = (noise(2, 4, seed=i) for i in range(3))
    alpha_t, sigma_t = schedule.at(999)
    alpha_s, sigma_s = schedule.at(499)
    expected = alpha_s * (x - sigma_t * m) / alpha_t + sigma_s * z
    np.testing.assert_allclose(reference_update(x, m, table, 0, noise=z), expected, rtol=0, atol=1e-9)
    with pytest.raises(ScheduleError, match="pass noise"):
        reference_update(x, m, table, 0)


BAD_TABLES = [
    ("zero terminal SNR", (999,), "epsilon", ScheduleError, "no x0 at alpha_t = 0"),
    ("flow", (999, 499), "epsilon", ScheduleError, "no x0 at alpha_t = 0"),
    ("stable diffusion", (999,), "flow", ScheduleError, "needs a flow schedule"),
    ("flow", (999,), "v_prediction", ScheduleError, "use 'flow'"),
    ("stable diffusion", (999,), "eps", ScheduleError, "must be one of"),
    ("stable diffusion", (1000, 499), "epsilon", PlanError, "timestep 1000 is outside the schedule's 0..999"),
]


@pytest.mark.parametrize(("name", "timesteps", "prediction_type", "error", "message"), BAD_TABLES)
def test_tables_that_do_not_exist(name, timesteps, prediction_type, error, message):
    with pytest.raises(error) as caught:
        update_table(SCHEDULES[name], StepPlan(timesteps), prediction_type)
    assert message in str(caught.value)


def test_every_defined_pair_is_tested():
    assert {prediction for _, prediction in DEFINED} == set(PREDICTION_TYPES)
