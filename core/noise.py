"""The initial noise x_T: one counter-based generator per picture, so a seed gives the same noise in any batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def initial_noise(seed: int, count: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """float32 (count, C, h, w), unit Gaussian; row i is drawn by NumPy's Philox with key seed + i (Salmon et al. 2011)."""
    rows = [
        np.random.Generator(np.random.Philox(key=seed + i)).standard_normal(shape, np.float32) for i in range(count)
    ]
    return np.stack(rows)
