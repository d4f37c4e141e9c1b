"""Uploaded pictures: what is in them, and what bombs of every format do to the processes that read them."""

import asyncio
import io
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from imagine_flash.core.errors import BusyError, RequestError
from imagine_flash.engine.pictures import uploads
from imagine_flash.engine.pictures.reader import Unreadable, read_picture
from imagine_flash.engine.pictures.uploads import UploadReader

MOST = 16_777_216  # pixels


def read_image(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.frombuffer(read_picture(data, "image", size, MOST), np.uint8).reshape(size[1], size[0], 3)


def read_mask(data: bytes, size: tuple[int, int]) -> NDArray[np.float64]:
    return np.frombuffer(read_picture(data, "mask", size, MOST), np.uint8).reshape(size[1], size[0]) / 255


def upload(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    deep = upload(Image.fromarray(ramp))
    assert np.abs(read_image(deep, (64, 64))[..., 0].astype(float) - ramp / 257).max() <= 1
    assert np.abs(read_mask(deep, (64, 64)) - ramp / 65535).max() <= 1 / 255


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P"])
def test_a_mask_without_transparency_is_what_is_white_in_it(mode: str) -> None:
    """An alpha channel that is opaque all over, as drawing programs write it, says nothing."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    mask = read_mask(upload(Image.fromarray(pixels).convert(mode)), (8, 8))
    np.testing.assert_array_equal(mask, pixels / 255)


def test_a_mask_with_transparency_is_what_is_transparent() -> None:
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    mask = read_mask(upload(Image.fromarray(pixels)), (8, 8))
    assert mask[:4].all() and not mask[4:].any()


def test_transparency_of_a_picture_is_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[4:] = [200, 0, 0, 255]
    for kind in ("PNG", "WEBP"):
        found = read_image(upload(Image.fromarray(pixels), kind), (8, 8))
        assert (found[:3] >= 250).all() and found[6, 4, 0] > 150


def test_a_phones_picture_is_turned_as_it_is_looked_at() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # white is left, and after a quarter turn on top
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    found = read_image(file.getvalue(), (8, 8))
    assert (found[:4] == 255).all() and not found[4:].any()


def test_several_pictures_in_a_jpeg_are_the_first_and_have_no_more_scans_either() -> None:
    """As phones write them; the count of scans passed them by."""
    file, scans = io.BytesIO(), repeated_scans(100, 200)
    Image.new("RGB", (32, 32), (10, 200, 30)).save(
        file, "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))]
    )
    data = file.getvalue()
    assert np.abs(read_image(data, (16, 16))[0, 0].astype(int) - [10, 200, 30]).max() < 4
    marker = data[data.index(b"\xff\xe2") :]
    with pytest.raises(Unreadable, match="scans; at most 64"):
        read_image(scans[:2] + marker[: 2 + int.from_bytes(marker[2:4], "big")] + scans[2:], (16, 16))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_large_picture_is_what_pillow_makes_of_it(kind: str) -> None:
    """It is made smaller while it is unpacked, which must not be seen."""
    gradient = np.linspace(0, 255, 1200)[:, None, None] * np.ones((1, 900, 3))
    picture = Image.fromarray(gradient.astype(np.uint8))
    expected = np.asarray(picture.resize((64, 85), Image.Resampling.BICUBIC).crop((0, 10, 64, 74))).astype(int)
    assert np.abs(read_image(upload(picture, kind), (64, 64)) - expected).max() <= 8


def png(*chunks: tuple[bytes, bytes], width: int, height: int, colour: int = 2) -> bytes:
    """colour: 2 is RGB, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


def repeated_scans(times: int, side: int = 4000) -> bytes:
    """A progressive JPEG whose last scan comes again and again: 96 KB took 13 seconds, 366 KB 108; half a second with a newer
    libjpeg."""
    file = io.BytesIO()
    Image.effect_noise((side, side), 0).convert("RGB").save(file, "JPEG", progressive=True, quality=50)
    data = file.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + times * last + b"\xff\xd9"


def animation(frames: int) -> bytes:
    file = io.BytesIO()
    rest = [Image.new("RGB", (16, 16), (0, 3 * i, 0)) for i in range(1, frames)]
    Image.new("RGB", (16, 16)).save(file, "WEBP", save_all=True, append_images=rest, lossless=True)
    return file.getvalue()


BOMBS = {
    "many pixels": (lambda: png((b"IDAT", zlib.compress(bytes(10**6))), width=30_000, height=30_000), "more than the"),
    "more than the limit": (
        lambda: png((b"IDAT", b""), width=5000, height=5000),
        "5000x5000 pixels; at most 16,777,216",
    ),
    "text that unpacks to 50 MB": (
        lambda: png((b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))), width=8, height=8),
        "no PNG, JPEG or WebP",
    ),
    "repeated scans": (lambda: repeated_scans(100, 200), "scans; at most 64"),
    "many frames": (lambda: animation(80), "80 frames; at most 64"),
    "another format": (lambda: upload(Image.new("RGB", (8, 8)), "GIF"), "no PNG, JPEG or WebP"),
    "nothing": (lambda: b"", "no PNG, JPEG or WebP"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_unpacked(name: str) -> None:
    make, says = BOMBS[name]
    with pytest.raises(Unreadable, match=says):
        read_picture(make(), "image", (64, 64), MOST)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_refused_in_words(kind: str) -> None:
    good, rng = upload(Image.effect_noise((40, 40), 50).convert("RGB"), kind), random.Random(0)
    for _ in range(200):
        data = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.3 else good)
        for _ in range(rng.randrange(1, 9) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_picture(bytes(data), "image", (16, 16), MOST)
        except Unreadable as error:
            assert "\n" not in str(error)


def test_a_picture_that_takes_too_long_is_given_up_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking happened in threads, which nothing ends: two such files stopped every edit, and the server's own end."""
    monkeypatch.setattr(uploads, "SECONDS", 0.2)
    slow, quick = repeated_scans(53, 4090), upload(Image.new("RGB", (64, 64), (10, 20, 30)))

    async def main() -> None:
        reader = UploadReader(MOST)
        reader.start()
        while reader._free.qsize() < uploads.WORKERS:
            await asyncio.sleep(0.01)
        before = {process.pid for process in reader._processes}
        bombs = [asyncio.create_task(reader.image(slow, (64, 64), "greedy")) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert (await reader.image(quick, (64, 64), "other"))[0, 0].tolist() == [10, 20, 30]
        assert not any(bomb.done() for bomb in bombs), "one client has one picture read at a time"
        for bomb in bombs:
            with pytest.raises(RequestError, match=r"image takes more than 0\.2 seconds to unpack"):
                await bomb
        killed = before - {process.pid for process in reader._processes}
        assert killed and not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in killed)
        mask = await reader.mask(upload(Image.new("L", (32, 32), 255)), (64, 64))
        assert mask.dtype == np.float32 and (mask == 1).all()
        await reader.close()

    asyncio.run(main())


def test_who_hangs_up_stops_the_unpacking_and_only_so_many_wait() -> None:
    async def main() -> None:
        reader = UploadReader(MOST)
        waiting = [asyncio.create_task(reader.image(repeated_scans(1, 300), (64, 64))) for _ in range(10)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="10 uploads are read or wait already"):
            await reader.image(b"", (64, 64))
        other = asyncio.create_task(reader.image(b"", (64, 64), "other"))
        for task in waiting[:5]:
            task.cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in done] == 5 * [True] + 5 * [False]
        assert all(one.shape == (64, 64, 3) for one in done[5:])  # type: ignore[union-attr]
        with pytest.raises(RequestError, match="no PNG"):  # another client still had its share of the places
            await other
        await reader.close()

    asyncio.run(main())


def test_of_processes_that_died_idle_nobody_hears() -> None:
    """The next picture was refused for each, as if it had ended the process."""

    async def main() -> None:
        reader = UploadReader(MOST)
        reader.start()
        while reader._free.qsize() < uploads.WORKERS:
            await asyncio.sleep(0.01)
        dead = list(reader._processes)
        for process in dead:
            process.kill()
            await process.wait()
        data = upload(Image.new("RGB", (64, 64), (10, 20, 30)))
        try:
            async with asyncio.timeout(20):
                found = await asyncio.gather(*(reader.image(data, (64, 64), str(client)) for client in range(4)))
        finally:
            await reader.close()
        assert all(one[0, 0].tolist() == [10, 20, 30] for one in found)

    asyncio.run(main())


def test_a_process_that_ends_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        reader = UploadReader(MOST)
        reader.start()
        while not reader._processes:
            await asyncio.sleep(0.01)
        for process in list(reader._processes):
            process.kill()
        data = upload(Image.new("RGB", (64, 64), (10, 20, 30)))
        limit = time.monotonic() + 20
        while True:
            try:
                assert (await reader.image(data, (64, 64))).shape == (64, 64, 3)
                break
            except RequestError as error:
                assert "ended the process" in str(error) and time.monotonic() < limit
        await reader.close()

    asyncio.run(main())
