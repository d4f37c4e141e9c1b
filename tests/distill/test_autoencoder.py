"""The closed-form encoder is a principal component analysis, and the autoencoder is diffusers' own class."""

from typing import Any

import numpy as np
import pytest
import torch

from imagine_flash.distill.autoencoder import build_autoencoder, fit_encoder, initialise_decoder
from imagine_flash.distill.recipe import TeacherRecipe


def untrained(**autoencoder) -> Any:
    sizes = {"width": 48, "decoder_blocks": (1, 1, 0, 0), "latent_channels": 24, "fit": {"steps": 1}, **autoencoder}
    return build_autoencoder(TeacherRecipe.model_validate({"autoencoder": sizes, "fit": {"steps": 1}}))


def pictures(count: int = 400) -> torch.Tensor:
    """Smooth random pictures (count, 3, 32, 32) whose channels are correlated."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=32, mode="bicubic")
    return (smooth + 0.7 * smooth[:, :1] + 0.1).clamp(-1, 1)


def components(images: torch.Tensor, count: int) -> torch.Tensor:
    """Scores (N, count) of a PCA of 8x8 patches in [0, 1], by the singular value decomposition."""
    patches = torch.nn.functional.pixel_unshuffle(images.double().add(1).div(2), 8).movedim(1, -1).flatten(0, 2)
    centred = patches - patches.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:count].T


@pytest.mark.parametrize("whitening", [0.0, 0.3, 1.0])
def test_the_encoder_spans_the_principal_components(whitening):
    autoencoder, images = untrained(), pictures()
    fit_encoder(autoencoder, images, whitening, 0.7)
    with torch.no_grad():
        latents = autoencoder.encode(images).latents * autoencoder.config.scaling_factor
    ours, theirs = latents.movedim(1, -1).flatten(0, 2).double(), components(images, 24)
    assert ours.mean(0).abs().max() < 1e-4
    assert ours.square().mean() == pytest.approx(0.49, abs=1e-3)
    solution = torch.linalg.lstsq(ours, theirs).solution
    assert (ours @ solution - theirs).square().mean() < 1e-6 * theirs.square().mean()
    spread, wanted = ours.std(0), theirs.std(0) ** (1 - whitening)
    np.testing.assert_allclose(spread / spread[0], wanted / wanted[0], rtol=2e-2)


def test_a_narrow_encoder_still_has_the_wanted_variance():
    """Width 8 cannot hold the twelve numbers of a 2x2 patch: the levels keep what they can."""
    autoencoder, images = untrained(width=8, latent_channels=4), pictures()
    fit_encoder(autoencoder, images, 0.3, 0.7)
    with torch.no_grad():
        latents = autoencoder.encode(images).latents * autoencoder.config.scaling_factor
    assert latents.shape == (400, 4, 4, 4)
    assert latents.std() == pytest.approx(0.7, abs=1e-3)


def test_an_untrained_decoder_is_grey_and_alive():
    autoencoder, images = untrained(), pictures(64)
    torch.manual_seed(0)
    fit_encoder(autoencoder, images, 0.3, 0.7)
    initialise_decoder(autoencoder, images)
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(images).latents).sample
    assert decoded.shape == images.shape
    assert decoded.std() == pytest.approx(0.25, abs=1e-3)  # the mean picture is grey: it starts there and moves
