"""Muon by its definition: near-orthogonal steps of a known size, the same whether matrices are alone or stacked."""

import pytest
import torch
from torch import nn

from imagine_flash.distill.muon import Muon, orthogonalised
from imagine_flash.distill.optimizers import build_optimizers, rate_factor
from imagine_flash.distill.recipe import Fit


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (40, 16), (5, 12, 30)])
def test_singular_values_become_near_one_and_the_directions_stay(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalised(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.4 and values.median() > 0.6
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    cosine = (result * (u @ vh)).sum((-2, -1)) / result.norm(dim=(-2, -1)) / (u @ vh).norm(dim=(-2, -1))
    assert cosine.min() > 0.95


def test_stacked_is_alone() -> None:
    pair = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalised(pair)[1], orthogonalised(pair[1]), atol=2e-2, rtol=0)


def test_the_step_has_the_stated_size_and_goes_downhill() -> None:
    weight = nn.Parameter(torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(2)))
    before, target = weight.detach().clone(), torch.zeros_like(weight)
    optimizer = Muon([weight], lr=0.1)
    (weight - target).square().sum().backward()
    optimizer.step()
    change = weight.detach() - before
    assert change.square().mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.25)
    assert (change * before).sum() < 0


def test_who_is_trained_by_what() -> None:
    """Matrices inside the network by Muon; embeddings, biases, norms, the first and the last layer by AdamW."""
    network = nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 8, 3),
            "block": nn.Conv2d(8, 8, 3),
            "norm": nn.GroupNorm(2, 8),
            "words": nn.Embedding(5, 8),
            "linear": nn.Linear(8, 8),
            "conv_out": nn.Conv2d(8, 3, 3),
        }
    )
    adamw, muon = build_optimizers(network, Fit(steps=1, optimizer="muon", muon_rate=0.01))
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in by_muon}
    assert names == {"block.weight", "linear.weight"} and muon.param_groups[0]["initial_lr"] == 0.01
    rest = sum(len(group["params"]) for group in adamw.param_groups)
    assert rest + 2 == len(list(network.parameters()))
    (alone,) = build_optimizers(network, Fit(steps=1))
    assert sum(len(group["params"]) for group in alone.param_groups) == rest + 2


def test_rates() -> None:
    assert rate_factor(0, Fit(steps=100, warmup=10)) == pytest.approx(0.1)
    assert rate_factor(50, Fit(steps=100, warmup=10, schedule="constant")) == 1
    assert rate_factor(75, Fit(steps=100, warmup=10, schedule="linear")) == pytest.approx(0.25)
    assert rate_factor(100, Fit(steps=100, warmup=10)) == pytest.approx(0.02)
