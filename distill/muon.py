"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

torch.optim.Muon takes matrices only; most weights of a UNet are convolutions, which count here as matrices with a row for each
output channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: fast from small singular values, not exact at 1
_ITERATIONS = 5


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, about: singular values between 0.7 and 1.2. matrix (M, N); computed in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions. The step has a root mean square of 0.2 x the rate (Liu et al. 2025,
    arXiv 2502.16982, eq. 4), so that rates are of AdamW's kind."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(buffer, group["momentum"]).flatten(1)
                size = 0.2 * math.sqrt(max(ahead.shape))
                weight.add_(orthogonalised(ahead).view_as(weight), alpha=-group["lr"] * size)
