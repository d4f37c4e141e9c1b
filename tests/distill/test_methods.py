"""Each method's loss against closed forms, on data of one point and on Gaussian data."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from imagine_flash.core.errors import RecipeError
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.update import reference_update, update_table
from imagine_flash.distill.backward import dpm_solver, rollout, table_of
from imagine_flash.distill.methods import (
    METHODS,
    add,
    distill_recipe,
    dmd2,
    flash,
    lcm,
    method_named,
    step_distillation,
)
from imagine_flash.distill.methods.contract import DistillationLoss, Draws
from imagine_flash.distill.models import Denoiser
from imagine_flash.distill.reproducible import seeded
from imagine_flash.tests.distill import mixture
from imagine_flash.tests.distill.toy import gaussian_denoiser, point_denoiser, scales

FIT = {"steps": 100}
SIZE, SHAPE = 64, (1, 2, 2)
NOTHING = (torch.zeros(SIZE, 1, 1),)


def draws(step: int = 0, size: int = SIZE, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Draws:
    generator = seeded(seed, step)
    pictures = 0.5 + 0.4 * torch.randn((size, *shape), generator=generator)
    return Draws(
        step=step,
        size=size,
        latent_shape=shape,
        last_time=999,
        generator=generator,
        shared=np.random.default_rng([seed, step]),
        pictures=pictures,
    )


def drawn(method: Any, recipe: Any, step: int = 0, **changes: Any) -> dict[str, Any]:
    return {**method.draw(draws(step), recipe), "text": NOTHING, "uncond": NOTHING, **changes}


class ConsistentGaussian(nn.Module):
    """v of a student that lands, from any time of a grid, where a denoiser's deterministic steps along the grid land."""

    def __init__(self, denoiser: Denoiser, grid: list[float], boundary: float | None) -> None:
        super().__init__()
        self.denoiser, self.grid, self.boundary = denoiser, grid, boundary

    @torch.no_grad()
    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        landed = torch.empty_like(x_t)
        for row, time in enumerate(t.long().tolist()):
            times = [s for s in self.grid if s <= time]
            x, own = x_t[row : row + 1], (text[row : row + 1],)
            for now, s in zip(times, [*times[1:], None], strict=True):
                x0, eps = self.denoiser.x0_eps(x, now, own)
                if s is not None:
                    x = self.denoiser.noised(x0, eps, s)
                elif self.boundary is None:  # a consistency model ends on the grid's least noisy state
                    x = x0
            landed[row] = x
        alpha, sigma = scales(self.denoiser.schedule, t)
        if self.boundary is not None:  # f = c_skip x_t + c_out x0
            scaled = self.boundary * t.view(-1, 1, 1, 1)
            c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
            landed = (landed - c_skip * x_t) / c_out.clamp_min(1e-12)
        return (alpha * x_t - landed) / sigma


def test_lcm_has_no_loss_where_every_time_lands_on_one_point_of_the_trajectory() -> None:
    teacher = gaussian_denoiser()
    grid: list[float] = [*range(999, 0, -100), 0]
    student = teacher.with_network(ConsistentGaussian(teacher, grid, 10.0))
    recipe = distill_recipe({"method": "lcm", "solver_steps": 10, "huber": 1e-4, "target_decay": 0, "fit": FIT})
    batch = drawn(lcm, recipe)
    assert set(batch["t"].tolist()) == set(range(99, 1000, 100)) and set((batch["t"] - batch["s"]).tolist()) == {
        99,
        100,
    }
    assert lcm.loss(student, teacher, batch, recipe, {}).item() < 1e-4
    assert lcm.loss(teacher, teacher, batch, recipe, {}).item() > 1e-2  # whose own estimate is the mean of many ends


def test_lcm_trains_at_pure_noise_whatever_its_steps() -> None:
    """With 30 steps it began at 989, and its students at 999."""
    recipe = distill_recipe({"method": "lcm", "solver_steps": 30, "fit": FIT})
    batch = lcm.draw(draws(size=2000), recipe)
    assert batch["t"].max() == 999 and len(set(batch["t"].tolist())) == 30
    assert set((batch["t"] - batch["s"]).tolist()) <= {32, 33, 34} and batch["s"].min() == 0
    with pytest.raises(RecipeError, match="solver_steps must be at most the teacher's 1000 times, got 1001"):
        drawn(lcm, distill_recipe({"method": "lcm", "solver_steps": 1001, "fit": FIT}))


def test_lcms_target_follows_the_student() -> None:
    student = gaussian_denoiser(shift=1.0)
    recipe = distill_recipe({"method": "lcm", "target_decay": 0.9, "fit": FIT})
    companions: dict[str, Any] = {name: c.network for name, c in lcm.companions(student, student, recipe).items()}
    assert not any(p.requires_grad for p in companions["target"].parameters())
    student.network.shift.data.fill_(2.0)
    lcm.after_update(student, companions, recipe, 0)
    assert companions["target"].shift.item() == pytest.approx(1.1)


@pytest.mark.parametrize("step", [30, 60, 99])
def test_two_steps_of_the_last_round_are_one_of_the_target(step: int) -> None:
    """One deterministic step with the target as x0 lands where core's reference lands by two of the last round's student."""
    teacher = gaussian_denoiser()
    recipe = distill_recipe({"method": "step_distillation", "fit": FIT})
    batch = drawn(step_distillation, recipe, step)
    z = teacher.noised(batch["x0"], batch["noise"], batch["t"])
    target = step_distillation.two_steps(teacher, z, batch, NOTHING)
    for row in range(8):
        t, middle, s = (int(batch[name][row]) for name in ("t", "middle", "s"))
        table = update_table(
            teacher.schedule,
            StepPlan(tuple(v for v in (t, middle, s) if v >= 0)),
            "v_prediction",
            noise_correction=False,
        )
        x = z[row : row + 1].numpy()
        for i in range(2):
            m = teacher(torch.from_numpy(x), int(table.timesteps[i]), (torch.zeros(1, 1, 1),)).detach().numpy()
            x = reference_update(x, m, table, i)
        alpha_t, sigma_t = (float(v) for v in teacher.schedule.at(t))
        alpha_s, sigma_s = (float(v) for v in teacher.schedule.at(s)) if s >= 0 else (1.0, 0.0)
        x0 = target[row : row + 1].detach().numpy()
        eps = (z[row : row + 1].numpy() - alpha_t * x0) / sigma_t
        np.testing.assert_allclose(alpha_s * x0 + sigma_s * eps, x, atol=2e-4)


def test_the_rounds_of_step_distillation() -> None:
    recipe = distill_recipe({"method": "step_distillation", "first_steps": 16, "fit": FIT})
    assert [recipe.steps_at(step) for step in (0, 24, 25, 49, 50, 74, 75, 99, 100)] == [
        None,
        None,
        16,
        16,
        8,
        8,
        4,
        4,
        4,
    ]
    student = gaussian_denoiser(shift=1.0)
    companions: dict[str, Any] = {
        name: c.network for name, c in step_distillation.companions(student, student, recipe).items()
    }
    student.network.shift.data.fill_(3.0)
    step_distillation.after_update(student, companions, recipe, 25)
    assert companions["last_round"].shift.item() == 1.0
    step_distillation.after_update(student, companions, recipe, 49)
    assert companions["last_round"].shift.item() == 3.0


def test_guidance_is_distilled_first() -> None:
    """Text moves the mean by c, none by u: the student that is u + w (c - u) off the data has no loss in the first stage."""
    recipe = distill_recipe({"method": "step_distillation", "guidance": [3.0, 3.0], "fit": FIT})
    text, uncond = (torch.full((SIZE, 1, 1), 0.2),), (torch.full((SIZE, 1, 1), 0.1),)
    batch = drawn(step_distillation, recipe, 0, text=text, uncond=uncond)
    teacher = point_denoiser()
    batch |= {"x0": torch.randn(SIZE, 3, 4, 4), "noise": torch.randn(SIZE, 3, 4, 4)}

    class Guided(nn.Module):
        def forward(self, x_t, t, told):
            return teacher.network(x_t, t, torch.full_like(told, 0.1 + 3 * 0.1))

    assert step_distillation.loss(teacher.with_network(Guided()), teacher, batch, recipe, {}).item() < 1e-6
    assert step_distillation.loss(teacher, teacher, batch, recipe, {}).item() > 1e-2


def test_adds_distillation_term_is_the_weighted_distance_to_the_teachers_estimate() -> None:
    """The teacher knows one point only; a student that misses it by d has mean(alpha_u) d^2."""

    class Off(nn.Module):
        def forward(self, x_t, t, text):
            alpha, sigma = scales(teacher.schedule, t)
            return (alpha * x_t - teacher.network.point - 0.3) / sigma

    teacher = point_denoiser()
    recipe = distill_recipe({"method": "add", "distillation_weight": 1.0, "fit": FIT})
    batch = drawn(add, recipe)
    batch |= {name: torch.randn(SIZE, 3, 4, 4) for name in ("x0", "noise", "noise_teacher")}
    alpha_u, _ = teacher.scales(batch["u"], batch["x0"])
    _, distillation = add.distillation_loss(teacher.with_network(Off()), teacher, batch, recipe)
    assert distillation.item() == pytest.approx(alpha_u.mean().item() * 0.09, rel=1e-3)


def test_matching_moves_against_the_difference_of_the_scores() -> None:
    """Both scores Gaussian and known: the gradient by x0 is (x0_fake - x0_real) / mean |x0 - x0_real| / number of values."""
    teacher, fake = gaussian_denoiser(0.5, 0.4), gaussian_denoiser(-0.2, 0.7)
    recipe = distill_recipe({"method": "dmd2", "gan_weight": 0, "fit": FIT})
    batch = drawn(dmd2, recipe)
    x0 = (-0.2 + 0.7 * torch.randn((SIZE, *SHAPE), generator=torch.Generator().manual_seed(2))).requires_grad_(True)
    dmd2.matching_loss(teacher, fake, x0, batch, NOTHING).backward()
    u = batch["u"].float()
    z = teacher.noised(x0.detach(), batch["noise_u"], batch["u"])
    real, faked = (d.network.x0(z, u, NOTHING[0]) for d in (teacher, fake))
    expected = (faked - real) / (x0.detach() - real).abs().mean((1, 2, 3), keepdim=True) / x0.numel()
    torch.testing.assert_close(x0.grad, expected, rtol=1e-3, atol=1e-7)
    same = x0.detach().requires_grad_(True)
    dmd2.matching_loss(teacher, teacher, same, batch, NOTHING).backward()
    assert same.grad is not None and same.grad.abs().max() < 1e-6  # what has the data's score is left alone


def test_the_true_score_of_the_students_pictures_has_the_least_loss() -> None:
    recipe = distill_recipe({"method": "dmd2", "gan_weight": 0, "fit": FIT})
    given = draws(size=20_000)
    batch = {**dmd2.draw(given, recipe)}
    text = (torch.zeros(20_000, 1, 1),)
    x0 = -0.2 + 0.7 * torch.randn((20_000, *SHAPE), generator=given.generator)
    values = [
        dmd2.score_loss(gaussian_denoiser(m, s), x0, batch, text).item()
        for m, s in ((-0.2, 0.7), (0.0, 0.7), (-0.2, 0.5))
    ]
    assert values[0] == min(values)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_fake_score_learns_at_every_time_what_its_network_predicts(predicts: str) -> None:
    """The gradient by the network's output is that of its own squared error, at T too, where eps has none of a v network's."""
    denoiser = gaussian_denoiser()
    said = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0)).requires_grad_(True)

    class Says(nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return said

    score = Denoiser(network=Says(), schedule=denoiser.schedule, prediction_type=predicts)
    x0, noise = torch.randn((2, 2, *SHAPE), generator=torch.Generator().manual_seed(1))
    q = torch.tensor([999, 200])
    dmd2.score_loss(score, x0, {"noise_q": noise, "q": q}, NOTHING).backward()
    alpha, sigma = scales(denoiser.schedule, q)
    m = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[predicts]
    torch.testing.assert_close(said.grad, 2 * (said.detach() - m) / x0.numel())


def test_who_learns_in_dmd2() -> None:
    """The fake score in every update; the student in its turn alone; neither through the other's terms."""
    recipe = distill_recipe({"method": "dmd2", "gan_weight": 0, "ratio": 3, "fit": FIT})
    teacher = gaussian_denoiser()
    for step in range(4):
        student = gaussian_denoiser(shift=0.5)
        module = DistillationLoss(method_named("dmd2"), student, teacher, recipe)
        module(**drawn(dmd2, recipe, step)).backward()
        assert (student.network.shift.grad is not None) == (step % 3 == 0)
        assert module.companions["fake_score"].shift.grad is not None and teacher.network.shift.grad is None


def test_backward_simulation_re_noises_the_students_own_estimates() -> None:
    """A student that knows one point: the state before the third step is alpha point + sigma of the last fresh noise."""
    student = point_denoiser()
    table = table_of(student, (999, 749, 499), sampler=dmd2.METHOD.sampler)
    x_T, *fresh = torch.randn(3, 5, 3, 4, 4)
    text = (torch.zeros(5, 2, 3),)
    z = rollout(lambda x, t: student(x, t, text), x_T, table, 2, noises=fresh)
    expected = student.noised(student.network.point.expand_as(z), fresh[1], 499)
    torch.testing.assert_close(z, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("start", [0, 3, 7])
def test_flash_has_no_loss_where_the_student_lands_where_the_teacher_does(start: int) -> None:
    teacher = gaussian_denoiser()
    recipe = distill_recipe({"method": "flash", "teacher_steps": 8, "adversarial_weights": [0, 0, 0, 0], "fit": FIT})
    grid = list(StepPlan.trailing(8).timesteps)
    student = teacher.with_network(ConsistentGaussian(teacher, grid, None))
    batch = drawn(flash, recipe, start=start)
    assert flash.loss(student, teacher, batch, recipe, {}).item() < 1e-6
    if start < 7:
        assert flash.loss(teacher, teacher, batch, recipe, {}).item() > 1e-3


@pytest.mark.parametrize("huber", [None, 0.01])
def test_flash_takes_the_solver_and_the_loss_that_its_recipe_names(huber: float | None) -> None:
    teacher, student = gaussian_denoiser(), point_denoiser()
    fields = {"method": "flash", "teacher_steps": 4, "teacher_solver": "dpm_solver++", "huber": huber, "fit": FIT}
    recipe = distill_recipe({**fields, "adversarial_weights": [0, 0, 0, 0], "matching_weights": [0, 0, 0, 0]})
    batch, times = drawn(flash, recipe, start=0), StepPlan.trailing(4).timesteps
    step = teacher.guided(batch["text"], batch["uncond"], batch["guidance"])
    error = lcm.consistency(student, batch["noise"], times[0], batch["text"]) - dpm_solver(
        teacher, step, batch["noise"], times
    )
    expected = error.square().mean() if huber is None else ((error**2 + huber**2).sqrt() - huber).mean()
    torch.testing.assert_close(flash.loss(student, teacher, batch, recipe, {}), expected)


def test_flash_starts_at_four_places_whose_weights_move() -> None:
    recipe = distill_recipe({"method": "flash", "teacher_steps": 32, "fit": FIT})
    for phase, weights in enumerate(flash.BUMPS):
        p = recipe.start_probabilities(phase)
        assert p.sum() == pytest.approx(1)
        near = [p[max(0, m - 3) : m + 4].sum() for m in (0, 8, 16, 24)]
        assert np.argmax(near) in np.flatnonzero(np.array(weights) == max(weights)) or phase == 1
    assert [recipe.phase_at(step) for step in (0, 24, 25, 50, 75, 99)] == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_own_parts_alone_and_repeats_itself(name: str) -> None:
    """The same step gives the same loss and gradients; the teacher has none; parts without a rate have none."""
    plans = {"plans": {1: [999]}} if name == "step_distillation" else {}
    recipe = distill_recipe({"method": name, "fit": FIT, **plans})
    method, teacher, found = method_named(name), mixture.untrained(), []
    for _ in range(2):
        torch.manual_seed(0)
        student = teacher.with_network(copy.deepcopy(teacher.network).requires_grad_(True))
        module = DistillationLoss(method, student, teacher, recipe)
        batch = method.draw(draws(90, shape=(2, 1, 1)), recipe)
        text = mixture.text_of(torch.arange(SIZE) % mixture.CLASSES)
        loss = module(**batch, text=text, uncond=mixture.text_of(torch.full((SIZE,), mixture.CLASSES)))
        loss.backward()
        trained = {name for name, p in module.named_parameters() if p.grad is not None}
        found.append((loss.item(), [p.grad.clone() for p in module.parameters() if p.grad is not None]))
        assert any(part.startswith("student.") for part in trained)
        for part in module.parameter_groups():
            assert any(name.startswith(f"{part}.") for name in trained)
        assert {name.split(".")[0] for name in trained} == {"student", *module.parameter_groups()}
        assert all(p.grad is None for p in teacher.network.parameters())
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_the_fake_score_of_a_teacher_in_half_precision_trains_in_float32() -> None:
    """It took the teacher's type, in which the updates of Adam are lost."""
    recipe, teacher = distill_recipe({"method": "dmd2", "gan_weight": 0, "fit": FIT}), gaussian_denoiser()
    teacher.network.to(torch.bfloat16)
    fake_score = dmd2.companions(gaussian_denoiser(), teacher, recipe)["fake_score"].network
    assert {p.dtype for p in fake_score.parameters()} == {torch.float32}
    assert next(teacher.network.parameters()).dtype == torch.bfloat16
