"""The paper's discriminator, whose form it leaves open: small heads on what the frozen teacher sees in noised latents.

As in LADD (Sauer et al. 2024, arXiv 2403.12015): features of a network that knows pictures at every noise level, so that the
noise level chosen decides whether structure or detail is judged. Hinge loss, text by projection, R1 on the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _Reached(Exception):
    """The last layer that is listened to has answered: the rest of the network need not run."""


class Features:
    """What the down blocks and the middle block of a UNet give for (x_t, t, text): (B, C, h, w) each, from fine to coarse."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.layers = [*unet.down_blocks, unet.mid_block]  # type: ignore[misc]

    @property
    def channels(self) -> list[int]:
        widths: Any = self.unet.config.block_out_channels  # type: ignore[union-attr]
        return [*widths, widths[-1]]

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        """Differentiable in x_t; the network runs as far as its middle."""
        found: list[torch.Tensor] = []

        def listen(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            if len(found) == len(self.layers):
                raise _Reached

        handles = [layer.register_forward_hook(listen) for layer in self.layers]
        try:
            self.unet(x_t, t, encoder_hidden_states=text)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [features.float() for features in found]


class Discriminator(nn.Module):
    """One head per level of features; each gives a map of logits, conditioned on the text by projection (Miyato & Koyama 2018)."""

    def __init__(self, channels: Sequence[int], text_width: int, width: int = 64, groups: int = 8) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(groups, c),
                nn.Conv2d(c, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 4, stride=2, padding=1),
                nn.SiLU(),
            )
            for c in channels
        )
        self.logits = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        self.texts = nn.ModuleList(nn.Linear(text_width, width, bias=False) for _ in channels)

    def forward(self, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """Logits (B, M) of all levels' places, from features (B, C, h, w) each and text (B, L, D)."""
        pooled, found = text.mean(1), []
        for body, logit, project, level in zip(self.bodies, self.logits, self.texts, features, strict=True):
            seen = body(level)
            match = (project(pooled)[:, :, None, None] * seen).sum(1, keepdim=True) / seen.shape[1] ** 0.5
            found.append((logit(seen) + match).flatten(1))
        return torch.cat(found, 1)

    def frozen(self, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """The same logits, with a gradient to the features alone."""
        weights = {name: value.detach() for name, value in self.named_parameters()}
        return torch.func.functional_call(self, weights, (features, text))


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)) (Lim & Ye 2017)."""
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def r1_penalty(discriminator: Discriminator, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """The squared gradient of the real logits by the features that enter the heads (Mescheder et al. 2018; as ADD does)."""
    inputs = [level.detach().requires_grad_(True) for level in features]
    logits = discriminator(inputs, text)
    gradients = torch.autograd.grad(logits.mean(1).sum(), inputs, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1).mean() for g in gradients]).sum()


def adversarial_gradient(
    discriminator: Discriminator,
    features: Features,
    x0: torch.Tensor,
    noise: torch.Tensor,
    levels: Any,
    t: torch.Tensor,
    text: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradient of -D(x0 noised to t) by x0, and the features it was judged by; levels: (alpha_t, sigma_t) as (B, 1, 1, 1)."""
    alpha_t, sigma_t = levels
    with torch.enable_grad():
        own = x0.detach().requires_grad_(True)
        seen = features(alpha_t * own + sigma_t * noise, t, text)
        loss = -discriminator.frozen(seen, text).mean()
        (gradient,) = torch.autograd.grad(loss, own)
    return gradient, [level.detach() for level in seen]
