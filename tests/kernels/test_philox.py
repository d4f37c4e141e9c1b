"""The reference's noise: published vectors of Philox, moments, and independence of everything but the seed."""

import pytest
import torch

from imagine_flash.kernels.philox import normal, philox


@pytest.mark.parametrize(
    ("seed", "offset", "words"),
    [  # Random123's kat_vectors, philox4x32 10: counter (low, high, 0, 0), key (low, high)
        (0, 0, (0x6627E8D5, 0xE169C58D))
    ],
)
def test_known_answers(seed, offset, words):
    first, second = philox(torch.tensor([seed]), torch.tensor([offset]))
    assert (int(first), int(second)) == words


def test_unit_gaussian():
    z = normal(torch.tensor([7, 8]), 100_000).double()
    assert z.mean().abs() < 0.01
    assert (z.std() - 1).abs() < 0.01
    assert ((z**4).mean() - 3).abs() < 0.1
    assert (z[0] * z[1]).mean().abs() < 0.01


def test_a_row_depends_on_its_seed_only():
    seeds = torch.tensor([5, 2**40 + 5, -1])
    together = normal(seeds, 1023)
    for i, seed in enumerate(seeds):
        assert torch.equal(normal(seed.view(1), 1023)[0], together[i])
        assert torch.equal(normal(seed.view(1), 10)[0], together[i, :10])
    assert not torch.equal(together[0], together[1]), "the upper half of a seed counts"
