"""How far one image is from another."""

import numpy as np
from numpy.typing import NDArray

MAX_PSNR = 100.0  # dB, said of equal images: infinity is no JSON


def psnr(got: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean squared difference), dB; 100 at most, 0 for another shape."""
    if got.shape != expected.shape:
        return 0.0
    error = float(np.square(got.astype(np.float64) - expected).mean())
    return MAX_PSNR if error == 0 else min(MAX_PSNR, float(10 * np.log10(255.0**2 / error)))
