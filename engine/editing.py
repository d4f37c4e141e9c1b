"""Image to image and inpainting through a student's own plans: where to start, and what to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RequestError
from ..folders.manifests import Size

DEFAULT_STRENGTH = 0.75  # without a mask; with one, what is drawn starts from pure noise
Array = Any  # NumPy's, or the backend's


@dataclass(frozen=True, eq=False)
class Start:
    """The picture that a request starts from, as its backend's arrays. mask: where 1, latents are drawn; None: everywhere.

    latents (1, C, h, w), mask (1, 1, h, w).
    """

    latents: Array
    mask: Array | None = None

    def at(self, noise: Array, alpha: float, sigma: float) -> Array:
        """x_t = alpha latents + sigma eps: the picture at a noise level."""
        return self.latents * alpha + noise * sigma

    def kept(self, x: Array, noise: Array, alpha: float, sigma: float) -> Array:
        """x where the mask is 1, the picture at x's noise level where it is 0."""
        if self.mask is None:
            return x
        known = self.at(noise, alpha, sigma)
        return known + (x - known) * self.mask


def first_step(timesteps: Sequence[float], last: int, strength: float) -> int:
    """The step of a plan whose timestep is nearest to strength x last, the noisier of two; 0 at strength 1."""
    return min(range(len(timesteps)), key=lambda i: abs(timesteps[i] / last - strength))


def latent_mask(mask: NDArray[np.float32], downscale: int) -> NDArray[np.float32]:
    """(H, W) in 0..1 -> (1, 1, h, w): the largest value in each latent's square, so what is drawn is covered whole."""
    height, width = mask.shape
    squares = mask.reshape(height // downscale, downscale, width // downscale, downscale)
    return squares.max(axis=(1, 3))[None, None]


def restore(images: NDArray[np.uint8], original: NDArray[np.uint8], mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The drawn images (B, H, W, 3) where the mask (H, W) is 1, the original (H, W, 3) to the bit where it is 0."""
    share = mask[..., None]
    return np.rint(images * share + original * (1 - share)).astype(np.uint8)


def check_size_of(name: str, shape: tuple[int, ...], size: Size, size_text: str) -> None:
    """Raises RequestError for a picture (H, W, 3) of another size."""
    if shape[:2] != size:
        raise RequestError(
            f"{name} must have the request's size {size_text}, got {shape[1]}x{shape[0]}; resize it first", param=name
        )


def check_picture(image: NDArray[np.uint8], mask: NDArray[np.float32] | None, size: Size, size_text: str) -> None:
    """Raises RequestError for a picture or mask of another size."""
    check_size_of("image", image.shape, size, size_text)
    if mask is not None and mask.shape != size:
        given = f"{mask.shape[1]}x{mask.shape[0]}"
        raise RequestError(f"mask must have the request's size {size_text}, got {given}", param="mask")
