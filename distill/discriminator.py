"""The paper's discriminator, whose form it leaves open: small heads on what the frozen teacher sees in noised latents.

As in LADD (Sauer et al. 2024, arXiv 2403.12015): features of a network that knows pictures at every noise level, so that the
noise level chosen decides whether structure or detail is judged. Hinge loss, text by projection, R1 on the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..pipelines.networks import Conditions
from .models import Denoiser, Times


class _LastFeature(Exception):
    """The last layer whose output is kept has run: the rest of the network need not."""


@dataclass(frozen=True)
class FeatureLayers:
    """Where a network's features are read: layers, the channels of each, the width of the text, latents per token's side;
    and what builds untrained heads for them."""

    layers: tuple[nn.Module, ...]
    channels: tuple[int, ...]
    text_width: int
    patch: int = 1
    build_heads: Callable[[Sequence[int], int], nn.Module] = lambda channels, width: Discriminator(channels, width)


def feature_layers(network: Any) -> FeatureLayers:
    """Of a UNet the down blocks and the middle one; of a transformer a quarter, a half and three quarters of its blocks."""
    if hasattr(network, "feature_layers"):
        return network.feature_layers
    if hasattr(network, "unet"):
        unet = network.unet
        widths = unet.config.block_out_channels
        return FeatureLayers(
            (*unet.down_blocks, unet.mid_block), (*widths, widths[-1]), unet.config.cross_attention_dim
        )
    config, blocks = network.transformer.config, network.transformer.transformer_blocks
    chosen = tuple(blocks[i] for i in sorted({len(blocks) * k // 4 for k in (1, 2, 3)}))
    width = config.num_attention_heads * config.attention_head_dim
    text_width = config.get("joint_attention_dim") or config.caption_channels
    return FeatureLayers(chosen, (width,) * len(chosen), text_width, config.patch_size)


class NetworkFeatures:
    """What layers inside a denoiser give for (x_t, t, text): float32 (B, C, h, w) each, in the order in which they run."""

    def __init__(self, denoiser: Denoiser, *, deepest: bool = False) -> None:
        """deepest: only the last of the layers, a UNet's middle block."""
        places = feature_layers(denoiser.network)
        if deepest:
            places = replace(places, layers=places.layers[-1:], channels=places.channels[-1:])
        self.denoiser, self.places = denoiser, places

    def heads(self) -> nn.Module:
        """Untrained heads for these features: heads(features, text) -> logits (B, M)."""
        return self.places.build_heads(self.places.channels, self.places.text_width)

    def __call__(self, x_t: torch.Tensor, t: Times, text: Conditions) -> list[torch.Tensor]:
        """Differentiable in x_t; the network runs as far as the last of the layers."""
        found: list[torch.Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            features = output[-1] if self.places.patch > 1 and isinstance(output, tuple) else output
            found.append(features[0] if isinstance(features, tuple) else features)
            if len(found) == len(self.places.layers):
                raise _LastFeature

        handles = [layer.register_forward_hook(keep) for layer in self.places.layers]
        try:
            self.denoiser(x_t, t, text)
        except _LastFeature:
            pass
        finally:
            for handle in handles:
                handle.remove()
        height, width = (side // self.places.patch for side in x_t.shape[-2:])
        # contiguous: the second derivative of a convolution crashed torch 2.11 and 2.13 on other layouts
        return [(f if f.ndim == 4 else f.mT.unflatten(2, (height, width))).contiguous().float() for f in found]


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


def frozen_logits(heads: nn.Module, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """The logits of heads, with a gradient to the features alone."""
    weights = {name: value.detach() for name, value in heads.named_parameters()}
    return torch.func.functional_call(heads, weights, (features, text))


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)) (Lim & Ye 2017)."""
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def r1_penalty(heads: nn.Module, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """The squared gradient of the mean real logit by the features that enter the heads (Mescheder et al. 2018). ADD has the sum of
    a level's logits: with M logits in all its weight stands for up to M^2 as much here."""
    inputs = [level.detach().requires_grad_(True) for level in features]
    logits = heads(inputs, text)
    gradients = torch.autograd.grad(logits.mean(1).sum(), inputs, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1).mean() for g in gradients]).sum()


def adversarial_gradient(
    heads: nn.Module,
    features: NetworkFeatures,
    x0: torch.Tensor,
    noise: torch.Tensor,
    levels: Any,
    t: torch.Tensor,
    text: Conditions,
    loss: Callable[[torch.Tensor], torch.Tensor] = lambda logits: -logits.mean(),
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradient by x0 of a loss of D(x0 noised to t), and the features behind its logits, both without a graph.

    levels: (alpha_t, sigma_t) as (B, 1, 1, 1). loss: of the logits (B, M); the hinge loss's by default.
    """
    alpha_t, sigma_t = levels
    with torch.enable_grad():
        own = x0.detach().requires_grad_(True)
        seen = features(alpha_t * own + sigma_t * noise, t, text)
        (gradient,) = torch.autograd.grad(loss(frozen_logits(heads, seen, text[0])), own)
    return gradient, [level.detach() for level in seen]
