"""Backward distillation by its oracles: a perfect student has no loss, the teacher no gradient, the rollout no graph."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagine_flash.core.errors import RecipeError
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.core.update import sample, update_table
from imagine_flash.distill.backward import Solver, choose_noise, rollout, shifted_time, teacher_plan, teacher_target
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.methods.contract import DistillationLoss, Draws
from imagine_flash.distill.methods.imagine_flash import METHOD, ImagineFlashRecipe, draw, loss, steps_from
from imagine_flash.distill.models import Denoiser, model_of
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.run import Run
from imagine_flash.distill.task import DistillTask
from imagine_flash.distill.weighting import KINDS, distance, loss_weight
from imagine_flash.tests.distill.toy import SD_CONFIG, gaussian_denoiser, point_denoiser
from imagine_flash.tests.pipelines import CAPTIONS, build_pipeline

FIT = {"steps": 1}


def loss_of(recipe: ImagineFlashRecipe, shift: float, plan: int, index: int) -> Any:
    teacher, student = point_denoiser(), point_denoiser(shift)
    draw = torch.Generator().manual_seed(5)
    x_T, fresh = torch.randn(2, 5, 3, 4, 4, generator=draw)
    text = (torch.zeros(5, 2, 3),)
    batch = {"x_T": x_T, "text": text, "uncond": text, "guidance": torch.full((5,), 2.0), "fresh": fresh}
    value = loss(student, teacher, batch | {"plan": plan, "index": index, "shifted": recipe.shifted}, recipe, {})
    return value, teacher.network, student.network


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("renoise", ["own", "fresh", "initial"])
@pytest.mark.parametrize(("plan", "index"), [(1, 0), (2, 1), (3, 0), (3, 2)])
@pytest.mark.parametrize("huber", [None, 0.01])
def test_a_perfect_student_has_no_loss(shifted: bool, renoise: str, plan: int, index: int, huber: float | None) -> None:
    recipe = ImagineFlashRecipe.model_validate({"shifted": shifted, "renoise": renoise, "huber": huber, "fit": FIT})
    value, _, _ = loss_of(recipe, 0.0, plan, index)
    assert value.item() < 1e-6


@pytest.mark.parametrize("shifted", [True, False])
def test_only_the_student_gets_a_gradient(shifted: bool) -> None:
    recipe = ImagineFlashRecipe.model_validate({"shifted": shifted, "fit": FIT})
    value, teacher, student = loss_of(recipe, 0.3, 3, 2)
    value.backward()
    assert student.shift.grad is not None and student.shift.grad.item() > 0
    assert teacher.shift.grad is None


def test_the_gradient_is_that_of_the_last_prediction_alone() -> None:
    """d/dshift of mean (x0_student - target)^2 where only the last x0 = alpha x - sigma v depends on the shift."""
    recipe = ImagineFlashRecipe.model_validate({"shifted": False, "fit": FIT})
    value, teacher, student = loss_of(recipe, 0.3, 2, 1)
    value.backward()
    sigma = teacher.schedule.sigma[499]
    assert value.item() == pytest.approx((sigma * 0.3) ** 2, rel=1e-4)
    assert student.shift.grad.item() == pytest.approx(2 * sigma**2 * 0.3, rel=1e-4)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("w", [1.0, 2.0, 3.5])
def test_guidance_is_in_the_target_only(shifted: bool, w: float) -> None:
    """Text moves the point by c, no text by u: the guided teacher lands on u + w (c - u), the student on c."""
    teacher, student = point_denoiser(), point_denoiser()
    recipe = ImagineFlashRecipe.model_validate({"shifted": shifted, "fit": FIT})
    text, uncond = (torch.full((5, 2, 3), 0.7),), (torch.full((5, 2, 3), 0.3),)
    x_T, fresh = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    batch = {"x_T": x_T, "text": text, "uncond": uncond, "guidance": torch.full((5,), w), "fresh": fresh}
    value = loss(student, teacher, batch | {"plan": 3, "index": 1, "shifted": shifted}, recipe, {})
    assert value.item() == pytest.approx(((w - 1) * 0.4) ** 2, abs=1e-5)


def test_a_robust_loss_is_the_length_of_large_errors_and_the_square_of_small_ones() -> None:
    """Of the same error sigma shift everywhere: sqrt(e^2 + d^2) - d, whose gradient by the shift is sigma e / sqrt(e^2 + d^2)."""
    for d in (1e-3, 0.05, 10.0):
        recipe = ImagineFlashRecipe.model_validate({"shifted": False, "huber": d, "fit": FIT})
        value, teacher, student = loss_of(recipe, 0.3, 2, 1)
        value.backward()
        sigma = teacher.schedule.sigma[499]
        error = sigma * 0.3
        assert value.item() == pytest.approx(np.hypot(error, d) - d, rel=2e-3)
        assert student.shift.grad.item() == pytest.approx(sigma * error / np.hypot(error, d), rel=1e-3)
    assert distance(torch.zeros(3), torch.tensor([100.0, 0.001, 0.0]), 0.1).item() == pytest.approx(
        (99.9 + 5e-6) / 3, rel=1e-4
    )


def test_who_is_asked_when() -> None:
    """The student along its plan up to t; the teacher from gamma t in k steps, or from t where nothing is shifted."""
    for shifted, times in ((True, [500, 375, 250, 125]), (False, [666, 500, 333, 166])):
        recipe = ImagineFlashRecipe.model_validate({"shifted": shifted, "gamma": 0.75, "teacher_steps": 4, "fit": FIT})
        _, teacher, student = loss_of(recipe, 0.0, 3, 1)
        assert student.calls == [999, 666] and teacher.calls == times


def test_fewer_steps_from_low_noise_and_a_gamma_of_the_first_step() -> None:
    """k (t / T)^fall steps, at least 2, also from a shifted time; k itself at T, and everywhere where nothing falls."""
    fields = {"gamma": 0.75, "first_gamma": 0.9, "teacher_steps": 6, "teacher_steps_fall": 1.5, "fit": FIT}
    recipe = ImagineFlashRecipe.model_validate(fields)
    for index, plain, shifted in ((0, 6, 5), (1, 3, 2), (2, 2, 2)):
        for is_shifted, count in ((False, plain), (True, shifted)):
            recipe = ImagineFlashRecipe.model_validate({**fields, "shifted": is_shifted})
            start = recipe.plans[3][index] * ((0.75 if index else 0.9) if is_shifted else 1)
            _, teacher, _ = loss_of(recipe, 0.0, 3, index)
            assert len(teacher.calls) == count and teacher.calls[0] == round(start)
    same = ImagineFlashRecipe.model_validate({"teacher_steps": 6, "fit": FIT})
    assert {steps_from(t, 999, same) for t in (1, 333, 999)} == {6}
    assert steps_from(999, 999, ImagineFlashRecipe.model_validate({**fields, "teacher_steps": 1})) == 1


@pytest.mark.parametrize(("first", "shares"), [(None, {0: 0.3, 1: 0.3}), (0.8, {0: 0.8, 1: 0.3})])
def test_the_first_step_has_a_share_of_its_own(first: float | None, shares: dict[int, float]) -> None:
    settings = {"ramp": 10, "first_share": first}
    recipe = ImagineFlashRecipe.model_validate({"adversarial": settings, "fit": FIT})
    found: dict[int, set[float]] = {0: set(), 1: set()}
    for step in range(40):
        draws = Draws(
            step=step,
            size=2,
            latent_shape=(1, 2, 2),
            last_time=999,
            generator=torch.Generator().manual_seed(step),
            shared=np.random.default_rng(step),
            pictures=torch.zeros(2, 1, 2, 2),
        )
        batch = draw(draws, recipe)
        if step >= 10:
            found[min(1, batch["index"])].add(batch["share"])
        else:
            assert batch["share"] == pytest.approx(shares[min(1, batch["index"])] * step / 10)
    assert found == {index: {share} for index, share in shares.items()}


def test_without_backward_distillation_the_student_sees_pictures_with_noise() -> None:
    """At t = T too: it is asked once, where alpha x0 + sigma eps of the picture is, and the teacher starts from there."""
    recipe = ImagineFlashRecipe.model_validate({"backward_distillation": False, "shifted": False, "fit": FIT})
    draw = torch.Generator().manual_seed(5)
    x_T, data = torch.randn(2, 5, 3, 4, 4, generator=draw)
    text = (torch.zeros(5, 2, 3),)
    batch = {"x_T": x_T, "fresh": x_T, "data": data, "text": text, "uncond": text, "guidance": torch.ones(5)}
    for index, t in enumerate(recipe.plans[3]):
        teacher, student = point_denoiser(), point_denoiser(0.3)
        seen: list[torch.Tensor] = []
        for network in (student.network, teacher.network):
            network.register_forward_pre_hook(lambda _, args, kept=seen: kept.append(args[0][:5].clone()))
        loss(student, teacher, batch | {"plan": 3, "index": index, "shifted": False}, recipe, {})
        alpha, sigma = (float(f) for f in teacher.schedule.at(t))
        assert student.network.calls == [t] and teacher.network.calls[0] == t
        for state in seen[:2]:
            torch.testing.assert_close(state, alpha * data + sigma * x_T, atol=1e-5, rtol=0)


def test_the_rollout_keeps_no_graph_and_equals_the_reference() -> None:
    denoiser = point_denoiser(0.2)
    table = update_table(denoiser.schedule, StepPlan((999, 666, 333)), "v_prediction")
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
        return denoiser(x, t, (torch.zeros(len(x), 2, 3),))

    x = rollout(denoise, x_T, table, 3)
    assert x.grad_fn is None and not x.requires_grad
    expected = sample(lambda x, t: denoise(torch.from_numpy(x), int(t)).detach().numpy(), x_T.numpy(), table)
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-5)


def test_the_teacher_makes_k_steps_down_to_the_clean_estimate() -> None:
    denoiser = point_denoiser()
    x = torch.randn(2, 3, 4, 4)
    text = (torch.zeros(2, 1, 1),)
    target = teacher_target(denoiser, x, 500, 4, text, text, torch.ones(2))
    assert denoiser.network.calls == [500, 375, 250, 125]
    torch.testing.assert_close(target, denoiser.network.point.expand_as(target), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("t", "k"), [(999, 6), (999, 2), (500, 4), (749, 8), (3, 4)])
def test_the_second_order_solver_is_diffusers_own(t: int, k: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    teacher, text, uncond = gaussian_denoiser(), (torch.full((2, 1, 1), 0.3),), (torch.zeros(2, 1, 1),)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    target = teacher_target(teacher, x, t, k, text, uncond, 2.0, solver="dpm_solver++")
    scheduler: Any = DPMSolverMultistepScheduler.from_config(
        {**SD_CONFIG, "_class_name": "DPMSolverMultistepScheduler"}, solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=list(teacher_plan(t, k).timesteps))
    step, state = teacher.guided(text, uncond, 2.0), x
    for time in scheduler.timesteps:
        state = scheduler.step(step(state, int(time)), time, state).prev_sample
    torch.testing.assert_close(target, state, atol=2e-5, rtol=1e-5)


def test_with_few_steps_the_second_order_solver_ends_nearer_to_many() -> None:
    teacher, text = gaussian_denoiser(0.5, 1.2), (torch.zeros(64, 1, 1),)
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    exact = teacher_target(teacher, x, 999, 500, text, text, 1.0)
    solvers: tuple[Solver, ...] = ("ddim", "dpm_solver++")
    ddim, second = (teacher_target(teacher, x, 999, 8, text, text, 1.0, solver=name) for name in solvers)
    assert (second - exact).square().mean() < 0.2 * (ddim - exact).square().mean()


@pytest.mark.parametrize(
    "config", [{"rescale_betas_zero_snr": True}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}]
)
def test_the_second_order_solver_where_no_signal_or_no_noise_is_left(config: dict[str, Any]) -> None:
    """At t = T without signal and, of a flow, at t = 0 without noise, lambda is infinite: these steps are of first order."""
    flow = "_class_name" in config
    schedule = NoiseSchedule.from_scheduler_config(config if flow else SD_CONFIG | config)
    kind = "flow" if flow else "v_prediction"

    class Point(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return x - 0.5 if flow else torch.zeros_like(x)

    teacher, text = Denoiser(network=Point(), schedule=schedule, prediction_type=kind), (torch.zeros(2, 1, 1),)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    last = teacher.last_time
    for solver in ("ddim", "dpm_solver++"):
        assert teacher_target(teacher, x, last, 4, text, text, 1.0, solver=solver).isfinite().all()


def test_times() -> None:
    assert [shifted_time(t, 0.75) for t in (999, 666, 0)] == [749, 500, 0]
    assert shifted_time(999, 0.75) < 999
    assert teacher_plan(2, 4).timesteps == (2, 1, 0)  # 2, 1.5, 1 and 0.5 round to three times
    assert teacher_plan(0, 4).timesteps == (0,)


def test_the_noise_of_chi_is_a_choice() -> None:
    own, fresh, initial = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    assert [int(choose_noise(kind, own, fresh, initial)) for kind in ("own", "fresh", "initial")] == [1, 2, 3]


def test_chi_at_T_goes_on_with_the_true_noise_where_the_rollout_does() -> None:
    """With `own` noise chi is the student's next state: at t = T of a corrected rollout that holds x_T, not the predicted eps."""
    recipe = {"renoise": "own", "gamma": 0.75, "fit": FIT}
    seen: dict[bool, torch.Tensor] = {}
    for corrected in (True, False):
        teacher, student = point_denoiser(), point_denoiser(0.5)
        settings = ImagineFlashRecipe.model_validate({**recipe, "rollout_noise_correction": corrected})
        first: list[torch.Tensor] = []
        teacher.network.register_forward_pre_hook(lambda _, args, kept=first: kept.append(args[0][:5].clone()))
        x_T, text = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(5)), (torch.zeros(5, 2, 3),)
        batch = {"x_T": x_T, "text": text, "uncond": text, "guidance": torch.ones(5), "fresh": x_T}
        loss(student, teacher, batch | {"plan": 1, "index": 0, "shifted": True}, settings, {})
        seen[corrected] = first[0]
        v = student(x_T, 999, text)
        alpha, sigma = (float(f) for f in teacher.schedule.at(999))
        low, noisy = (float(f) for f in teacher.schedule.at(749))
        noise = x_T if corrected else sigma * x_T + alpha * v
        torch.testing.assert_close(seen[corrected], low * (alpha * x_T - sigma * v) + noisy * noise, atol=1e-5, rtol=0)
    assert not torch.allclose(seen[True], seen[False])


@pytest.mark.parametrize("correction", [True, False])
def test_the_rollout_is_corrected_where_inference_is(correction: bool) -> None:
    recipe = {"noise_correction": correction, "fit": FIT}
    assert ImagineFlashRecipe.model_validate(recipe).rollout_noise_correction == correction
    own = ImagineFlashRecipe.model_validate(recipe | {"rollout_noise_correction": not correction})
    assert own.rollout_noise_correction != correction


SIGNAL_TO_THE_END = NoiseSchedule.from_scheduler_config(SD_CONFIG)
FLOW = NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
NONE_AT_T = NoiseSchedule.from_scheduler_config({**SD_CONFIG, "rescale_betas_zero_snr": True})


@pytest.mark.parametrize(
    ("predicts", "schedule", "kind", "learns"),
    [
        ("epsilon", SIGNAL_TO_THE_END, "auto", True),
        ("v_prediction", NONE_AT_T, "auto", True),
        ("v_prediction", NONE_AT_T, "v", True),
        ("v_prediction", NONE_AT_T, "sqrt_snr", False),
        ("v_prediction", NONE_AT_T, "eps", False),
        ("flow", FLOW, "auto", True),
        ("flow", FLOW, "sqrt_snr", False),
    ],
)
def test_a_first_step_that_would_learn_nothing_is_refused(
    predicts: str, schedule: NoiseSchedule, kind: str, learns: bool
) -> None:
    teacher = Denoiser(network=torch.nn.Identity(), schedule=schedule, prediction_type=predicts)
    recipe = ImagineFlashRecipe.model_validate({"loss_weight": kind, "fit": FIT})
    with (
        contextlib.nullcontext()
        if learns
        else pytest.raises(RecipeError, match=f"{kind} weighs nothing at timestep 999")
    ):
        DistillationLoss(METHOD, teacher, teacher, recipe)


@pytest.mark.parametrize("t", [999, 499, 20])
def test_the_weight_makes_an_error_of_x0_one_of_the_prediction(t: int) -> None:
    denoiser = point_denoiser()
    alpha, sigma = (float(f) for f in denoiser.schedule.at(t))
    x_t, x0, wrong = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind(0)
    eps, eps_wrong = ((x_t - alpha * x) / sigma for x in (x0, wrong))
    v, v_wrong = alpha * eps - sigma * x0, alpha * eps_wrong - sigma * wrong
    error = (x0 - wrong).square().mean().item()
    assert loss_weight("eps", alpha, sigma) * error == pytest.approx((eps - eps_wrong).square().mean().item())
    assert loss_weight("v", alpha, sigma) * error == pytest.approx((v - v_wrong).square().mean().item())
    own = eps_wrong.clone().requires_grad_(True)
    loss = loss_weight("sqrt_snr", alpha, sigma) * ((x_t - sigma * own) / alpha - x0).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, own)[0], -2 * (wrong - x0))
    assert loss_weight("x0", alpha, sigma) == 1 and loss_weight("truncated_snr", alpha, sigma) >= 1


def test_the_docs_say_what_an_error_of_epsilon_counts() -> None:
    """They said that truncated_snr evens it out, which is x0's weight wherever there is more noise than signal."""
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    schedule = point_denoiser().schedule
    for kind in KINDS:
        counts = []
        for t in (999, 666, 499, 333):
            alpha, sigma = (float(f) for f in schedule.at(t))
            counts.append(loss_weight(kind, alpha, sigma) * (sigma / alpha) ** 2)
        row = " | ".join(f"{count:.0f}" if count > 100 else f"{count:.1f}" for count in counts)
        assert f"| `{kind}` | {row} |" in page, kind


def test_guidance_falls_with_t() -> None:
    """Text moves the point by c: at gamma(t) the guided target is u + w(gamma t) (c - u), w linear from 1 at 0 to w at T."""
    teacher, student = point_denoiser(), point_denoiser()
    recipe = ImagineFlashRecipe.model_validate({"guidance_at_0": 1.0, "gamma": 0.5, "fit": FIT})
    text, uncond = (torch.full((5, 2, 3), 0.7),), (torch.full((5, 2, 3), 0.3),)
    x_T, fresh = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    batch = {"x_T": x_T, "text": text, "uncond": uncond, "guidance": torch.full((5,), 3.0), "fresh": fresh}
    value = loss(student, teacher, batch | {"plan": 2, "index": 1, "shifted": True}, recipe, {})
    assert value.item() == pytest.approx((2.0 * 250 / 999 * 0.4) ** 2, rel=1e-3)


def test_a_plain_target_among_shifted_ones() -> None:
    recipe = ImagineFlashRecipe.model_validate({"fit": FIT})
    teacher, student = point_denoiser(), point_denoiser()
    x_T, text = torch.randn(5, 3, 4, 4), (torch.zeros(5, 2, 3),)
    batch = {"x_T": x_T, "text": text, "uncond": text, "guidance": torch.ones(5), "fresh": x_T}
    loss(student, teacher, batch | {"plan": 3, "index": 1, "shifted": False}, recipe, {})
    assert teacher.network.calls[0] == 666


def test_a_step_behind_a_rollout_teaches_every_weight_in_bf16(tmp_path: Path) -> None:
    """The rollout runs without a graph, and what it left of cast weights was taken for the step that has one."""
    fit = {"steps": 1, "batch": 2, "mixed_precision": "bf16"}
    recipe = distill_recipe({"plans": {2: [999, 499]}, "teacher_steps": 1, "fit": fit})
    task = DistillTask(recipe, model_of(build_pipeline()), list(CAPTIONS), "")
    run = Run(task, recipe.fit, [], tmp_path, shared=False)
    batch = next(b for step in range(20) if (b := task.batch(step, Part()))["index"] == 1)
    run.wrapped(**batch).backward()
    assert all(weight.grad is not None for weight in run.averaged) and task.student.network.conv_in.weight.grad.any()
