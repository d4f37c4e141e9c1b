"""PSNR in closed form."""

import numpy as np
import pytest

from imagine_flash.core.images import psnr


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(0, 100.0), (1, 48.13), (51, 13.98), (255, 0.0)],
    ids=["equal", "one", "a fifth", "all"],
)
def test_psnr(difference: int, expected: float) -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    assert psnr(black + np.uint8(difference), black) == pytest.approx(expected, abs=0.01)


def test_one_pixel_of_many() -> None:
    black = np.zeros((100, 100, 1), np.uint8)
    other = black.copy()
    other[3, 4] = 255
    assert psnr(other, black) == pytest.approx(40.0) and psnr(other[:1], black) == 0.0
