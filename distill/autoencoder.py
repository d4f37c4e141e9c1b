"""Stage one of a teacher: an AutoencoderTiny whose latents have zero mean and unit variance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from PIL import Image
from torch import nn
from torch.nn import functional

from .data.emoji import EmojiScenes
from .fit import identify, seeded
from .grids import grid, to_pixels
from .recipe import TeacherRecipe

_STATISTICS_WEIGHT = 0.02
_EDGE_WEIGHT = 1.0
_SQUARE_WEIGHT = 4.0  # an absolute error alone lets small details go: their median is the background


def build_autoencoder(recipe: TeacherRecipe) -> AutoencoderTiny:
    """The untrained autoencoder: 8x down, `latent_channels` deep; `scaling_factor` is 1 by its training."""
    ours = recipe.autoencoder
    return AutoencoderTiny(
        encoder_block_out_channels=(ours.width,) * 4,
        decoder_block_out_channels=(ours.width,) * 4,
        num_encoder_blocks=ours.blocks,
        num_decoder_blocks=ours.blocks[::-1],
        latent_channels=ours.latent_channels,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )


@torch.no_grad()
def initialise(autoencoder: AutoencoderTiny, images: torch.Tensor) -> None:
    """He initialisation with small residual branches, then latents of unit variance and grey pictures on `images`.

    torch's default lets the signal die in a deep ReLU network without normalisation: at the same number of updates the
    absolute error was still the error of the mean picture.
    """
    for layer in autoencoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in autoencoder.modules():
        if isinstance(block, AutoencoderTinyBlock):
            last: Any = block.conv[-1]  # type: ignore[index]
            last.weight.mul_(0.2)
    to_latents: Any = autoencoder.encoder.layers[-1]
    to_latents.weight.div_(autoencoder.encoder(images).std())
    to_picture: Any = autoencoder.decoder.layers[-1]
    to_picture.weight.mul_(0.25 / autoencoder.decoder(autoencoder.encoder(images)).std())
    to_picture.bias.fill_(0.5)  # the decoder ends with 2 x - 1


class ReconstructionLoss(nn.Module):
    """Absolute and edge error of the reconstruction, plus a pull of each latent channel to mean 0, variance 1."""

    def __init__(self, autoencoder: AutoencoderTiny, latent_noise: float) -> None:
        super().__init__()
        self.autoencoder, self.latent_noise = autoencoder, latent_noise

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) in [-1, 1]; noise (B, C, H/8, W/8) of unit variance."""
        latents = self.autoencoder.encoder(images)
        decoded = self.autoencoder.decoder(latents + self.latent_noise * noise)
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        statistics = (mean.square() + (variance - 1).square()).mean()
        edges = sum(
            functional.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)
        )  # what the eye sees and a mean error does not
        error = functional.l1_loss(decoded, images) + _SQUARE_WEIGHT * functional.mse_loss(decoded, images)
        return error + _EDGE_WEIGHT * edges + _STATISTICS_WEIGHT * statistics


class AutoencoderTask:
    """Fits the autoencoder on the stream of scenes."""

    name = "autoencoder"

    def __init__(self, recipe: TeacherRecipe, scenes: EmojiScenes) -> None:
        self.recipe, self.scenes = recipe, scenes
        self.identity = identify(recipe.autoencoder, recipe.seed, recipe.image_size)
        torch.manual_seed(recipe.seed)
        self.autoencoder = build_autoencoder(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        first = to_signed(np.stack([scenes[10**9 + i].image for i in range(64)]))
        initialise(self.autoencoder, first)
        self.module: nn.Module = ReconstructionLoss(self.autoencoder, recipe.autoencoder.latent_noise)

    def batch(self, step: int, rank: int) -> dict[str, Any]:
        size, side = self.recipe.autoencoder.fit.batch, self.recipe.image_size // 8
        first = (step * 64 + rank) * size
        images = np.stack([self.scenes[first + i].image for i in range(size)])
        noise = torch.randn(size, self.recipe.autoencoder.latent_channels, side, side, generator=seeded(1, step, rank))
        return {"images": to_signed(images).contiguous(memory_format=torch.channels_last), "noise": noise}

    @torch.no_grad()
    def preview(self) -> Image.Image:
        images = to_signed(np.stack([self.scenes[10**8 + i].image for i in range(16)]))
        images = images.to(next(self.module.parameters()).device)
        decoded = self.autoencoder.decoder(self.autoencoder.encoder(images))
        return grid(np.concatenate([to_pixels(images), to_pixels(decoded)]), columns=8)


def to_signed(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
