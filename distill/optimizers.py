"""Optimisers and learning rates of a recipe's `fit`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ..core.errors import missing_extra
from .muon import Muon
from .recipe import Fit

_FIRST_AND_LAST = re.compile(r"(^|\.)conv_(in|out)\.")  # layers whose rows are no features: not for Muon
_LEAST_8BIT, _BLOCK_8BIT = 4096, 256  # bitsandbytes' smallest tensor in codes, and how many share a scale


def rate_factor(step: int, fit: Fit) -> float:
    """The share of the recipe's rates at a step: linear warm-up, then constant, linear to 0, or half a cosine down to 2 %."""
    warm = min(1.0, (step + 1) / max(1, fit.warmup))
    if fit.schedule == "constant":
        return warm
    if fit.schedule == "linear":
        return warm * (1 - step / fit.steps)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / fit.steps)))


def special_parts(module: nn.Module) -> dict[str, tuple[nn.Module, float, tuple[float, float]]]:
    """Submodules by name that have a learning rate and betas of their own."""
    return module.parameter_groups() if hasattr(module, "parameter_groups") else {}  # type: ignore[operator]


def clipped_together(module: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters in the groups whose gradients are clipped by one norm: one per special part, and the rest."""
    special = special_parts(module)
    prefixes = tuple(f"{name}." for name in special)
    rest = [p for name, p in module.named_parameters() if p.requires_grad and not name.startswith(prefixes)]
    return [rest, *([p for p in part.parameters() if p.requires_grad] for part, _, _ in special.values())]


def adamw_8bit() -> Any:
    """bitsandbytes' AdamW, whose moments are codes of 8 bits in blocks of 256 with a scale each (Dettmers et al. 2022, arXiv
    2110.02861); small tensors keep float32. Raises MissingExtraError."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of 4-bit kernels that nothing here calls
    try:
        return import_module("bitsandbytes.optim").AdamW8bit
    except ImportError:
        raise missing_extra("bitsandbytes", "adam8bit") from None


def check_optimizer(fit: Fit) -> None:
    """Raises MissingExtraError where the recipe's optimiser is of a library that is not there."""
    if fit.optimizer == "adamw8bit":
        adamw_8bit()


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What its state takes after the first update, beside a few numbers: two moments for AdamW, one for Muon."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if isinstance(optimizer, Muon):
        return sum(p.numel() * p.element_size() for p in weights)
    if isinstance(optimizer, torch.optim.AdamW):
        return 2 * sum(p.numel() * p.element_size() for p in weights)
    small, large = ([p.numel() for p in weights if (p.numel() >= _LEAST_8BIT) == coded] for coded in (False, True))
    return 2 * sum(4 * n for n in small) + 2 * sum(n + 4 * -(-n // _BLOCK_8BIT) for n in large)


def build_average(weights: Sequence[nn.Parameter], fit: Fit, *, on_gpu: bool, shared: bool) -> EMAModel:
    """The weights' average over the updates. On a GPU it moves by few launches for all of them, which of weights that are
    shared out torch does not do."""
    return EMAModel(weights, decay=fit.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=on_gpu and not shared)


def build_optimizers(module: nn.Module, fit: Fit) -> list[torch.optim.Optimizer]:
    """AdamW for every trainable weight, its moments in float32 or 8 bits; or Muon for the matrices inside the network and
    AdamW for the rest."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    special = special_parts(module)
    groups = [{"params": list(part.parameters()), "lr": lr, "betas": betas} for part, lr, betas in special.values()]
    common = {name: p for name, p in trainable.items() if not name.startswith(tuple(f"{part}." for part in special))}
    inner: set[str] = set()
    if fit.optimizer == "muon":
        tables = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
        inner = {
            name
            for name, p in common.items()
            if p.ndim >= 2 and name not in tables and not _FIRST_AND_LAST.search(name)
        }
    groups.insert(0, {"params": [p for name, p in common.items() if name not in inner]})
    how: Any = {"lr": fit.learning_rate, "betas": fit.betas, "weight_decay": fit.weight_decay, "eps": 1e-8}
    eight = fit.optimizer == "adamw8bit"
    adamw = adamw_8bit()(groups, **how) if eight else torch.optim.AdamW(groups, **how, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if inner:
        optimizers.append(Muon([common[name] for name in sorted(inner)], lr=fit.muon_rate))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
