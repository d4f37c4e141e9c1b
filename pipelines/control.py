"""ControlNets and T2I-adapters as modules of plain tensors: what reads the picture once, and what the UNet is told at each step.

Zhang et al. 2023 (arXiv 2302.05543) and Mou et al. 2023 (arXiv 2302.08453), asked as diffusers' pipelines ask them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.control import CONTROLNET, check_control, feature_maps
from .stages import cast

GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as Pillow's mode L


@dataclass(frozen=True)
class Control:
    """A network that reads a conditioning picture. kind: diffusers' class. encoder: the picture -> `features`, once a request;
    network: what the UNet is told of them at each step. multiple: what the sides of the picture must be a multiple of."""

    kind: str
    encoder: torch.nn.Module
    features: tuple[str, ...]
    network: torch.nn.Module
    multiple: int


def control_of(module: Any, unet_config: Mapping[str, Any], downscale: int) -> Control:
    """A diffusers module as such. Raises ArtifactError for one of another base."""
    kind = type(module).__name__
    check_control(kind, module.config, unet_config, downscale)
    if kind == CONTROLNET:
        return Control(kind, ControlNetEncoder(module), ("control",), ControlNet(module), downscale)
    names = tuple(f"feature_{i}" for i, _ in enumerate(feature_maps(module.config)))
    return Control(kind, AdapterEncoder(module), names, Adapter(), math.lcm(downscale, module.downscale_factor))


class ControlNetEncoder(torch.nn.Module):
    """condition uint8 (B, H, W, 3) -> embedding (B, C, h, w), which does not change from step to step."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.embedding = controlnet.controlnet_cond_embedding
        self.is_bgr = controlnet.config.controlnet_conditioning_channel_order == "bgr"
        self.dtype = _computes_in(self.embedding)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = condition.flip(3) if self.is_bgr else condition
        return (self.embedding(cast(_unit(pixels), self.dtype)),)


class ControlNet(torch.nn.Module):
    """What the UNet adds to its down blocks' and middle's activations, each times scale (B,)."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.network = copy.copy(controlnet)  # the same weights, without the embedding, which comes as an input
        self.network._modules = {**controlnet._modules, "controlnet_cond_embedding": torch.nn.Identity()}
        self.network.register_to_config(controlnet_conditioning_channel_order="rgb")

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeddings: torch.Tensor,
        told: tuple[torch.Tensor, ...],
        **added: Any,
    ) -> dict[str, Any]:
        embedding, scale = told
        down, middle = self.network(
            latents,
            timestep,
            embeddings,
            controlnet_cond=cast(embedding, latents.dtype),
            conditioning_scale=cast(scale, latents.dtype).view(-1, 1, 1, 1),
            return_dict=False,
            **added,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


class AdapterEncoder(torch.nn.Module):
    """condition uint8 (B, H, W, 3) -> feature maps (B, C, h, w), which do not change from step to step. An adapter of one
    channel reads it in grey."""

    grey: torch.Tensor

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.adapter, self.is_grey = adapter, adapter.config.in_channels == 1
        self.register_buffer("grey", torch.tensor(GREY).view(1, 3, 1, 1), persistent=False)
        self.dtype = _computes_in(adapter)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = _unit(condition)
        pixels = (pixels * self.grey).sum(1, keepdim=True) if self.is_grey else pixels
        return tuple(self.adapter(cast(pixels, self.dtype)))


class Adapter(torch.nn.Module):
    """What the UNet adds inside its down blocks: the feature maps, each times scale (B,)."""

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeddings: torch.Tensor,
        told: tuple[torch.Tensor, ...],
        **added: Any,
    ) -> dict[str, Any]:
        *features, scale = (cast(each, latents.dtype) for each in told)
        return {"down_intrablock_additional_residuals": [each * scale.view(-1, 1, 1, 1) for each in features]}


def _unit(condition: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in 0..1."""
    return condition.to(torch.float32).permute(0, 3, 1, 2) / 255


def _computes_in(network: torch.nn.Module) -> torch.dtype:
    """A bias has the type of the arithmetic, whatever the weights are stored in."""
    return next(values.dtype for name, values in network.named_parameters() if name.endswith("bias"))
