"""What an error counts: by its size, and at a noise level."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("x0", "v", "eps", "sqrt_snr", "truncated_snr")
# By what the network predicts; x0 for all others. v is the error of a flow's velocity, which such teachers were trained on
AUTO = {"epsilon": "sqrt_snr", "flow": "v"}


def kind_for(kind: str, prediction_type: str) -> str:
    """Of KINDS; "auto" is that of the prediction type."""
    return AUTO.get(prediction_type, "x0") if kind == "auto" else kind


def loss_weight(kind: str, alpha_t: Any, sigma_t: Any) -> Any:
    """What a squared error of x0 counts: as it is, or as the error of v, or of eps, that it stands for, or between.

    From x_t = alpha x0 + sigma eps: an error d of x0 is one of d / sigma in v and of alpha d / sigma in eps, so the weight of
    eps is the signal-to-noise ratio snr = (alpha / sigma)^2. sqrt_snr: alpha / sigma, with which the loss's gradient by a
    predicted eps is -2 d at every time; x0 and eps give it sigma / alpha and alpha / sigma times that. truncated_snr:
    max(snr, 1) (Salimans & Ho 2022, section 4), that is x0's where there is more noise than signal. Numbers or tensors.
    """
    if kind == "x0":
        return 1.0
    if kind == "v":
        return 1.0 / sigma_t**2
    if kind == "sqrt_snr":
        return alpha_t / sigma_t
    snr = (alpha_t / sigma_t) ** 2
    if kind == "eps":
        return snr
    return snr.clamp_min(1.0) if isinstance(snr, torch.Tensor) else max(1.0, snr)


def distance(prediction: torch.Tensor, target: torch.Tensor, d: float | None) -> torch.Tensor:
    """The mean over all values of the error squared, or of the pseudo-Huber sqrt(error^2 + d^2) - d: the error's length far from
    0, which large errors do not rule, and its square over 2 d near 0 (Charbonnier et al. 1997). d: in units of the values."""
    squares = (prediction - target).square()
    return squares.mean() if d is None else ((squares + d**2).sqrt() - d).mean()
