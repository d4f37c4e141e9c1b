"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

torch.optim.Muon takes matrices only; most weights of a UNet are convolutions, which count here as matrices with a row for each
output channel.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: fast from small singular values, not exact at 1
_ITERATIONS = 5


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, about: singular values between 0.7 and 1.2. (..., M, N); computed in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = (c * gram @ gram).add_(gram, alpha=b).matmul(x).add_(x, alpha=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions. The step has a root mean square of 0.2 x the rate (Liu et al. 2025,
    arXiv 2502.16982, eq. 4), so that rates are of AdamW's kind. Matrices of one shape are made orthogonal together."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(buffer, group["momentum"]).flatten(1)
                shapes[ahead.shape].append((weight, ahead))
            for shape, pairs in shapes.items():
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for (weight, _), change in zip(pairs, orthogonalised(torch.stack([m for _, m in pairs])), strict=True):
                    weight.add_(change.view_as(weight), alpha=-rate)
