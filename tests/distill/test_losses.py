"""Backward distillation by its oracles: a perfect student has no loss, the teacher no gradient, the rollout no graph."""

import numpy as np
import pytest
import torch

from imagine_flash.core.plan import StepPlan
from imagine_flash.core.update import sample, update_table
from imagine_flash.distill.backward import TeacherTarget, choose_noise, renoised, rollout, shifted_time, teacher_plan
from imagine_flash.distill.losses import ImagineFlashLoss
from imagine_flash.distill.recipe import DistillRecipe
from imagine_flash.tests.distill.toy import point_networks

FIT = {"steps": 1}


def loss_of(recipe: DistillRecipe, shift: float, plan: int, index: int):
    teacher, student = point_networks(), point_networks(shift).unet
    draw = torch.Generator().manual_seed(5)
    x_T, fresh = torch.randn(2, 5, 3, 4, 4, generator=draw)
    text = torch.zeros(5, 2, 3)
    loss = ImagineFlashLoss(student, teacher, recipe)
    value = loss(
        x_T=x_T, text=text, uncond=text, guidance=torch.full((5,), 2.0), fresh=fresh, plan=plan, index=index
    )  # fmt: skip
    return value, teacher, student


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("renoise", ["own", "fresh", "initial"])
@pytest.mark.parametrize(("plan", "index"), [(1, 0), (2, 1), (3, 0), (3, 2)])
def test_a_perfect_student_has_no_loss(shifted: bool, renoise: str, plan: int, index: int) -> None:
    recipe = DistillRecipe.model_validate({"shifted": shifted, "renoise": renoise, "fit": FIT})
    value, _, _ = loss_of(recipe, 0.0, plan, index)
    assert value.item() < 1e-6


@pytest.mark.parametrize("shifted", [True, False])
def test_only_the_student_gets_a_gradient(shifted: bool) -> None:
    recipe = DistillRecipe.model_validate({"shifted": shifted, "fit": FIT})
    value, teacher, student = loss_of(recipe, 0.3, 3, 2)
    value.backward()
    assert student.shift.grad is not None and student.shift.grad.item() > 0
    assert teacher.unet.shift.grad is None


def test_the_gradient_is_that_of_the_last_prediction_alone() -> None:
    """d/dshift of mean (x0_student - target)^2 where only the last x0 = alpha x - sigma v depends on the shift."""
    recipe = DistillRecipe.model_validate({"shifted": False, "fit": FIT})
    value, teacher, student = loss_of(recipe, 0.3, 2, 1)
    value.backward()
    sigma = teacher.schedule.sigma[499]
    assert value.item() == pytest.approx((sigma * 0.3) ** 2, rel=1e-4)
    assert student.shift.grad.item() == pytest.approx(2 * sigma**2 * 0.3, rel=1e-4)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("w", [1.0, 2.0, 3.5])
def test_guidance_is_in_the_target_only(shifted: bool, w: float) -> None:
    """Text moves the point by c, no text by u: the guided teacher lands on u + w (c - u), the student on c."""
    teacher, student = point_networks(), point_networks().unet
    recipe = DistillRecipe.model_validate({"shifted": shifted, "fit": FIT})
    text, uncond = torch.full((5, 2, 3), 0.7), torch.full((5, 2, 3), 0.3)
    x_T, fresh = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    value = ImagineFlashLoss(student, teacher, recipe)(
        x_T=x_T, text=text, uncond=uncond, guidance=torch.full((5,), w), fresh=fresh, plan=3, index=1
    )  # fmt: skip
    assert value.item() == pytest.approx(((w - 1) * 0.4) ** 2, abs=1e-5)


def test_who_is_asked_when() -> None:
    """The student along its plan up to t; the teacher from gamma t in k steps, or from t where nothing is shifted."""
    for shifted, times in ((True, [500, 375, 250, 125]), (False, [666, 500, 333, 166])):
        recipe = DistillRecipe.model_validate({"shifted": shifted, "gamma": 0.75, "teacher_steps": 4, "fit": FIT})
        _, teacher, student = loss_of(recipe, 0.0, 3, 1)
        assert student.calls == [999, 666] and teacher.unet.calls == times


@pytest.mark.parametrize("t", [749, 500, 250])
def test_chi_is_the_prediction_at_the_shifted_time(t: int) -> None:
    networks = point_networks()
    x0, noise = torch.randn(2, 2, 3, 4, 4)
    alpha, sigma = (float(table[t]) for table in (networks.schedule.alpha, networks.schedule.sigma))
    torch.testing.assert_close(renoised(x0.requires_grad_(), noise, t, networks), alpha * x0.detach() + sigma * noise)
    assert alpha**2 + sigma**2 == pytest.approx(1) and not renoised(x0, noise, t, networks).requires_grad


def test_the_rollout_keeps_no_graph_and_equals_the_reference() -> None:
    networks = point_networks(0.2)
    table = update_table(networks.schedule, StepPlan((999, 666, 333)), "v_prediction")
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        return networks.unet(x, torch.full((len(x),), t), encoder_hidden_states=torch.zeros(len(x), 2, 3)).sample

    x = rollout(denoise, x_T, table, 3)
    assert x.grad_fn is None and not x.requires_grad
    expected = sample(lambda x, t: denoise(torch.from_numpy(x), int(t)).detach().numpy(), x_T.numpy(), table)
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-5)


def test_the_teacher_makes_k_steps_down_to_the_clean_estimate() -> None:
    networks = point_networks()
    x = torch.randn(2, 3, 4, 4)
    target = TeacherTarget(networks, 4)(x, 500, torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), torch.ones(2))
    assert networks.unet.calls == [500, 375, 250, 125]
    torch.testing.assert_close(target, networks.unet.point.expand_as(target), atol=1e-4, rtol=0)


def test_times() -> None:
    assert [shifted_time(t, 0.75) for t in (999, 666, 0)] == [749, 500, 0]
    assert shifted_time(999, 0.75) < 999
    assert teacher_plan(2, 4).timesteps == (2, 1, 0)  # 2, 1.5, 1 and 0.5 round to three times
    assert teacher_plan(0, 4).timesteps == (0,)


def test_the_noise_of_chi_is_a_choice() -> None:
    own, fresh, initial = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    assert [int(choose_noise(kind, own, fresh, initial)) for kind in ("own", "fresh", "initial")] == [1, 2, 3]
