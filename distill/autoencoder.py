"""Stage one of a teacher: an AutoencoderTiny with a closed-form linear encoder and a trained decoder."""

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
from .data.rendering import to_signed
from .grids import grid, to_pixels
from .recipe import TeacherRecipe
from .reproducible import Part, fingerprint, part_of, rows_of, seeded
from .run import Task

_SCALING_FACTOR = 2.0  # the decoder's soft clamp at 3 then touches few latents
_EDGE_WEIGHT = 1.0
_SQUARE_WEIGHT = 4.0  # an absolute error alone lets small details go: their median is the background


def build_autoencoder(recipe: TeacherRecipe) -> AutoencoderTiny:
    """The untrained autoencoder: 8x down, `latent_channels` deep, with an encoder that is linear (it has no blocks)."""
    ours = recipe.autoencoder
    return AutoencoderTiny(
        encoder_block_out_channels=(ours.width,) * 4,
        decoder_block_out_channels=(ours.width,) * 4,
        num_encoder_blocks=(0,) * 4,
        num_decoder_blocks=ours.decoder_blocks,
        latent_channels=ours.latent_channels,
        upsampling_scaling_factor=2,
        scaling_factor=_SCALING_FACTOR,
    )


@torch.no_grad()
def fit_encoder(autoencoder: AutoencoderTiny, images: torch.Tensor, whitening: float, deviation: float) -> None:
    """Set the encoder to a principal component analysis of the 8x8 patches of `images` (N, 3, H, W) in [-1, 1].

    Its three stride-2 convolutions are three levels of 2x2 patches, each cut to the components that fit the width: at a
    width of 48 or more nothing is lost before the last level. A component of standard deviation s becomes a latent of
    s^(1 - whitening), so that noise hides details before it hides structure; all latents together have the standard deviation
    `deviation` after `scaling_factor`, and each has mean 0.
    """
    layers: Any = [layer for layer in autoencoder.encoder.layers if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        layer.weight.zero_()
    colours, (first, *downs, last) = torch.arange(3), layers
    first.weight[colours, colours, 1, 1] = 1.0
    first.bias.zero_()
    signal, width, deviations = images.double().add(1).div(2), last.out_channels, torch.ones(1)
    for level, down in enumerate(downs):
        patches = functional.pixel_unshuffle(signal, 2)
        rows = patches.movedim(1, -1).flatten(0, 2)
        values, vectors = torch.linalg.eigh(torch.cov(rows.T))
        keep = min(width if level == len(downs) - 1 else down.out_channels, len(values))
        basis = vectors.flip(1)[:, :keep]
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # the same on every machine
        deviations = values.flip(0)[:keep].clamp_min(1e-12).sqrt()
        down.weight[:keep, : signal.shape[1], 1:, 1:] = basis.T.reshape(keep, -1, 2, 2).to(down.weight)
        signal = torch.einsum("bchw,ck->bkhw", patches, basis)
    gains = deviations ** (1 - whitening) / deviations
    gains *= deviation / (gains * deviations).square().mean().sqrt() / _SCALING_FACTOR
    kept = torch.arange(len(gains))
    last.weight[kept, kept, 1, 1] = gains.to(last.weight)
    last.bias.zero_()
    last.bias[: len(gains)] = -(gains * signal.mean((0, 2, 3))).to(last.bias)


@torch.no_grad()
def initialise_decoder(autoencoder: AutoencoderTiny, images: torch.Tensor) -> None:
    """He initialisation with small residual branches, and grey pictures on `images`.

    torch's default lets the signal die in a deep ReLU network without normalisation: at the same number of updates the
    absolute error was still the error of the mean picture.
    """
    for layer in autoencoder.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in autoencoder.decoder.modules():
        if isinstance(block, AutoencoderTinyBlock):
            last: Any = block.conv[-1]  # type: ignore[index]
            last.weight.mul_(0.2)
    to_picture: Any = autoencoder.decoder.layers[-1]
    to_picture.weight.mul_(0.25 / autoencoder.decoder(autoencoder.encoder(images)).std())
    to_picture.bias.fill_(0.5)  # the decoder ends with 2 x - 1


class ReconstructionLoss(nn.Module):
    """Absolute, squared and edge error of the pictures that the decoder makes of the encoder's latents."""

    def __init__(self, autoencoder: AutoencoderTiny, latent_noise: float) -> None:
        super().__init__()
        self.autoencoder, self.latent_noise = autoencoder, latent_noise / _SCALING_FACTOR

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) in [-1, 1]; noise (B, C, H/8, W/8) of unit variance."""
        with torch.no_grad():
            latents = self.autoencoder.encoder(images)
        decoded = self.autoencoder.decoder(latents + self.latent_noise * noise)
        edges = sum(
            functional.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)
        )  # what the eye sees and a mean error does not
        error = functional.l1_loss(decoded, images) + _SQUARE_WEIGHT * functional.mse_loss(decoded, images)
        return error + _EDGE_WEIGHT * edges


class AutoencoderTask(Task):
    """Fits the decoder on the stream of scenes; the encoder is set from the first of them."""

    name = "autoencoder"

    def __init__(self, recipe: TeacherRecipe, scenes: EmojiScenes) -> None:
        self.recipe, self.scenes = recipe, scenes
        self.fingerprint = fingerprint(recipe.autoencoder, recipe.seed, recipe.image_size)
        torch.manual_seed(recipe.seed)
        self.autoencoder = build_autoencoder(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        first = to_signed(np.stack([scenes[10**9 + i].image for i in range(recipe.autoencoder.encoder_scenes)]))
        fit_encoder(self.autoencoder, first, recipe.autoencoder.whitening, recipe.autoencoder.deviation)
        initialise_decoder(self.autoencoder, first[:64])
        self.autoencoder.encoder.requires_grad_(False)
        self.module: nn.Module = ReconstructionLoss(self.autoencoder, recipe.autoencoder.latent_noise)

    def batch(self, step: int, part: Part) -> dict[str, Any]:
        size, side = self.recipe.autoencoder.fit.batch, self.recipe.image_size // 8
        rows = range(step * 64 * size, (step * 64 + 1) * size)[rows_of(size, part)]
        images = np.stack([self.scenes[row].image for row in rows])
        noise = torch.randn(size, self.recipe.autoencoder.latent_channels, side, side, generator=seeded(1, step, 0))
        return {
            "noise": part_of(noise, size, part),
            "images": to_signed(images).contiguous(memory_format=torch.channels_last),
        }

    @torch.no_grad()
    def preview(self) -> Image.Image:
        images = to_signed(np.stack([self.scenes[10**8 + i].image for i in range(16)]))
        images = images.to(next(self.module.parameters()).device)
        decoded = self.autoencoder.decoder(self.autoencoder.encoder(images))
        return grid(np.concatenate([to_pixels(images), to_pixels(decoded)]), columns=8)
