"""Pixels to bytes and back."""

import io

import numpy as np
import pytest
from PIL import Image

from imagine_flash.engine.server.pictures import FORMATS, encode, read_image, read_mask

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


def upload(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    deep = upload(Image.fromarray(ramp))
    assert np.abs(read_image(deep, (64, 64), max_pixels=10**6)[..., 0].astype(float) - ramp / 257).max() <= 1
    assert np.abs(read_mask(deep, (64, 64), max_pixels=10**6) - ramp / 65535).max() <= 1 / 255


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P"])
def test_a_mask_without_transparency_is_what_is_white_in_it(mode: str) -> None:
    """An alpha channel that is opaque all over, as drawing programs write it, says nothing."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    mask = read_mask(upload(Image.fromarray(pixels).convert(mode)), (8, 8), max_pixels=100)
    np.testing.assert_array_equal(mask, pixels / 255)


def test_a_mask_with_transparency_is_what_is_transparent() -> None:
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    mask = read_mask(upload(Image.fromarray(pixels)), (8, 8), max_pixels=100)
    assert mask[:4].all() and not mask[4:].any()


def test_transparency_of_a_picture_is_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[4:] = [200, 0, 0, 255]
    for kind in ("PNG", "WEBP"):
        found = read_image(upload(Image.fromarray(pixels), kind), (8, 8), max_pixels=100)
        assert (found[:3] >= 250).all() and found[6, 4, 0] > 150
