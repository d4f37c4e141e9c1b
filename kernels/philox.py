"""Philox 4x32-10 in torch (Salmon et al. 2011): the numbers that `tl.randn(seed, offset)` draws, for the reference."""

from __future__ import annotations

import math

import torch

_KEYS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = (0xD2511F53, 0xCD9E8D57)
_WORD = 0xFFFFFFFF


def philox(seeds: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two of four 32-bit words, int64 (B, N), of key `seeds` int64 (B,) and counter `offsets` int64 (N,)."""
    low, high = seeds.long().view(-1, 1) & _WORD, (seeds.long().view(-1, 1) >> 32) & _WORD
    counters = offsets.long().view(1, -1)
    zero = torch.zeros_like(low * counters)
    words = (counters & _WORD) + zero, (counters >> 32) + zero, zero, zero
    for _ in range(10):
        first, third = _ROUNDS[0] * words[0], _ROUNDS[1] * words[2]  # wraps at 64 bits, whose bits are the product's
        words = (
            ((third >> 32) & _WORD) ^ words[1] ^ low,
            third & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ high,
            first & _WORD,
        )
        low, high = (low + _KEYS[0]) & _WORD, (high + _KEYS[1]) & _WORD
    return words[0], words[1]


def normal(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """float32 (B, count) unit Gaussian by Box and Muller (1958): row i depends on seeds[i] int64 and nothing else."""
    first, second = philox(seeds, torch.arange(count, device=seeds.device))
    u1, u2 = _uniform(first).clamp_min(1e-7), _uniform(second)
    return torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(2 * math.pi * u2)


def _uniform(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit word to float32 in [0, 1), as triton.language.random does it."""
    signed = torch.where(word > 0x7FFFFFFF, word - 2**32, word)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
