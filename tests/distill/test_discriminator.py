"""The discriminator on a real, tiny UNet: who gets a gradient, and how long it is."""

from typing import Any

import pytest
import torch
from torch import nn

from imagine_flash.distill.discriminator import NetworkFeatures, adversarial_gradient, hinge_loss, r1_penalty
from imagine_flash.distill.methods import distill_recipe, method_named
from imagine_flash.distill.methods.contract import DistillationLoss
from imagine_flash.distill.models import Model, load_model

BATCH = 6


@pytest.fixture(scope="module")
def teacher(tiny_student) -> Model:
    return load_model(tiny_student)


def inputs(teacher: Model) -> dict:
    draw = torch.Generator().manual_seed(3)
    x_T, fresh, real, noise, noise_real = (torch.randn(BATCH, *teacher.latent_shape, generator=draw) for _ in range(5))
    text = teacher.embed(["a cat", "a fox", "a dog"] * 2)
    seen = {"real": real, "noise": noise, "noise_real": noise_real, "t": torch.arange(BATCH) * 100, "share": 0.5}
    common = {
        "text": text,
        "uncond": (teacher.embed([""])[0].expand_as(text[0]),),
        "guidance": torch.full((BATCH,), 2.0),
    }
    return {"x_T": x_T, "fresh": fresh, "plan": 2, "index": 1, "shifted": True, **seen, **common}


def features_of(teacher: Model) -> NetworkFeatures:
    return NetworkFeatures(teacher.denoiser)


def heads_of(teacher: Model) -> nn.Module:
    return features_of(teacher).heads()


def adversarial_loss(teacher: Model, **settings: float) -> Any:
    torch.manual_seed(0)
    recipe = distill_recipe({"adversarial": settings, "fit": {"steps": 1}})
    return DistillationLoss(method_named("imagine_flash"), teacher.trainable_copy().denoiser, teacher.denoiser, recipe)


def test_features_are_what_the_blocks_give_and_the_rest_does_not_run(teacher: Model) -> None:
    x, t, text = torch.randn(2, *teacher.latent_shape), torch.tensor([5, 700]), teacher.embed(["a cat", "a dog"])
    seen: list[torch.Tensor] = []
    handle = teacher.network.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    ran: list[int] = []
    up = teacher.network.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    found = features_of(teacher)(x, t, text)
    assert not ran and torch.equal(found[-1], seen[0])
    assert [level.shape[1] for level in found] == list(features_of(teacher).places.channels)
    teacher.denoiser(x, t, text)  # it still runs whole, and nothing listens any longer
    assert ran and torch.equal(seen[1], seen[0])
    handle.remove()
    up.remove()


def test_the_adversarial_gradient_is_that_of_minus_the_logits(teacher: Model) -> None:
    """By finite differences in float64, through the noising, the frozen teacher and the heads."""
    features, draw = features_of(teacher), torch.Generator().manual_seed(1)
    heads = heads_of(teacher)
    x0, noise, way = (torch.randn(2, *teacher.latent_shape, generator=draw) for _ in range(3))
    t, text = torch.tensor([100, 600]), teacher.embed(["a cat", "a dog"])
    levels = teacher.denoiser.scales(t, x0)

    def loss(x: torch.Tensor) -> float:
        with torch.no_grad():
            return -heads(features(levels[0] * x + levels[1] * noise, t, text), text[0]).double().mean().item()

    gradient, seen = adversarial_gradient(heads, features, x0, noise, levels, t, text)
    slope = (loss(x0 + 1e-2 * way) - loss(x0 - 1e-2 * way)) / 2e-2
    assert (gradient * way).sum().item() == pytest.approx(slope, rel=2e-2, abs=1e-5)
    assert all(p.grad is None for p in heads.parameters()) and not any(level.requires_grad for level in seen)
    assert all(p.grad is None for p in teacher.network.parameters())


def test_the_pull_is_a_share_of_the_regressions_gradient(teacher: Model) -> None:
    """The student's gradient with share s is g_regression + s |g_regression| g_pull / |g_pull|, by x0: linear in s."""
    gradients = []
    for share in (0.0, 0.5, 1.0):
        loss, given = adversarial_loss(teacher), inputs(teacher)
        given["share"] = share
        loss(**given).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loss.student.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[2] - gradients[0], 2 * (gradients[1] - gradients[0]), rtol=1e-3, atol=1e-6)
    assert (gradients[1] - gradients[0]).norm() > 1e-3 * gradients[0].norm()


def test_heads_learn_and_the_students_term_does_not_reach_them(teacher: Model) -> None:
    without, given = adversarial_loss(teacher, r1=0.0), inputs(teacher)
    without(**given).backward()
    expected = [p.grad.clone() for p in without.discriminator.parameters() if p.grad is not None]
    other = adversarial_loss(teacher, r1=0.0)
    given["share"] = 0.0
    other(**given).backward()
    for ours, theirs in zip(other.discriminator.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs)


def test_heads_tell_two_distributions_apart(teacher: Model) -> None:
    """Real latents of mean 1, others of mean -1: after some updates the hinge loss is far below its 2 at the start."""
    torch.manual_seed(0)
    features = features_of(teacher)
    heads = heads_of(teacher)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=2e-3, betas=(0.0, 0.99))
    text, t = teacher.embed(["a cat"] * 8), torch.full((8,), 100)
    losses = []
    for _ in range(60):
        with torch.no_grad():
            real, fake = (features(torch.randn(8, *teacher.latent_shape) + s, t, text) for s in (1, -1))
        loss = hinge_loss(heads(real, text[0]), heads(fake, text[0])) + 1e-2 * r1_penalty(heads, real, text[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_r1_is_the_squared_slope_of_linear_heads() -> None:
    """Heads replaced by one linear map w: the penalty is |w|^2 / M^2 per picture, whatever the features."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.arange(12.0).view(3, 2, 2))

        def forward(self, features, text):
            return (features[0] * self.w).sum((1, 2, 3)).view(-1, 1)

    heads = Linear()
    penalty = r1_penalty(heads, [torch.randn(4, 3, 2, 2)], torch.zeros(4, 1, 1))  # type: ignore[arg-type]
    assert penalty.item() == pytest.approx(heads.w.square().sum().item(), rel=1e-6)
    penalty.backward()
    torch.testing.assert_close(heads.w.grad, 2 * heads.w)
