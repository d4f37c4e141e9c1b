"""Noise of a request: one counter-based generator per picture and step, so a seed gives the same in any batch and backend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STREAM = 1 << 192  # of Philox's 256-bit counter: no step's numbers run into those of the next


def initial_noise(seed: int, count: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """What x_T is made of: float32 (count, C, h, w), unit Gaussian; row i is picture seed + i."""
    return step_noise(seed, count, shape, 0)


def step_noise(seed: int, count: int, shape: tuple[int, int, int], draw: int) -> NDArray[np.float32]:
    """The draw-th noise of each picture, float32 (count, C, h, w), unit Gaussian: 0 is x_T, k the z of the k-th step.

    Row i is drawn by NumPy's Philox with key seed + i and a counter that starts at draw * 2^192 (Salmon et al. 2011).
    """
    generators = (np.random.Generator(np.random.Philox(key=seed + i, counter=draw * STREAM)) for i in range(count))
    return np.stack([generator.standard_normal(shape, np.float32) for generator in generators])
