"""Pixels to the bytes of files."""

import io

import numpy as np
import pytest
from PIL import Image

from imagine_flash.engine.pictures.files import FORMATS, encode, resize

RNG = np.random.default_rng(0)
PICTURES = {
    "noise": RNG.integers(0, 256, (48, 64, 3), np.uint8),
    "one colour": np.full((64, 48, 3), 200, np.uint8),
    "one pixel": np.array([[[1, 2, 255]]], np.uint8),
    "a view of a larger one": RNG.integers(0, 256, (4, 32, 32, 3), np.uint8)[2, ::2, ::-1],
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_png_is_what_pillow_reads_to_the_last_bit(name: str) -> None:
    found = Image.open(io.BytesIO(encode(PICTURES[name], "png")))
    found.load()  # checks the sums of its chunks
    assert found.format == "PNG" and found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), PICTURES[name])


def test_a_flat_png_is_no_larger_than_pillows() -> None:
    theirs = io.BytesIO()
    Image.fromarray(PICTURES["one colour"]).save(theirs, "PNG", compress_level=1)
    assert len(encode(PICTURES["one colour"], "png")) <= len(theirs.getvalue())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_keeps_the_size_and_nearly_the_colours(kind: str) -> None:
    pixels = PICTURES["one colour"]
    found = np.asarray(Image.open(io.BytesIO(encode(pixels, kind))).convert("RGB"))
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).max() <= 3


def test_a_picture_is_scaled_to_cover_and_cropped_around_its_middle() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255
    assert (resize(pixels, (32, 32))[8:24, 8:24] > 240).all() and resize(pixels, (4, 8)).shape == (4, 8, 3)
