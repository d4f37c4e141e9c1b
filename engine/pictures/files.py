"""Pixels to the bytes of files."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ...core.errors import missing_extra
from ...folders.manifests import Size

try:
    from PIL import Image, ImageOps
except ImportError:
    raise missing_extra("pillow", "serve") from None

T = TypeVar("T")
Format = Literal["png", "jpeg", "webp"]
FORMATS: dict[str, dict[str, object]] = {  # of small pictures that are looked at once: quick to write
    "png": {},  # `encode_png`
    "jpeg": {"quality": 92, "subsampling": 0},
    "webp": {"quality": 92, "method": 0},
}
SMALL = 100_000  # bytes of pixels: less work than changing threads


def encode(pixels: NDArray[np.uint8], kind: str, quality: int | None = None) -> bytes:
    """One image (H, W, 3) as a file's bytes. quality: 0 to 100, of jpeg and webp."""
    if kind == "png":
        return encode_png(pixels)
    buffer = io.BytesIO()
    given = {} if quality is None else {"quality": quality}
    Image.fromarray(pixels).save(buffer, format=kind.upper(), **(FORMATS[kind] | given))
    return buffer.getvalue()


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """One image (H, W, 3) as PNG: every row as its difference to the one above, run lengths and Huffman codes. As
    small as Pillow's of its lowest level, in less than half of the time (0.15 against 0.34 ms for 64x64, here)."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, -1)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = 2  # the filter "up"
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    packer = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = {b"IHDR": header, b"IDAT": packer.compress(filtered.data) + packer.flush(), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def resize(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """One image (H, W, 3) scaled to cover (height, width), and cropped to it around its middle."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), Image.Resampling.LANCZOS))


class Turns:
    """One at a time of each client's."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, client: str) -> asyncio.Lock:
        return self._locks.setdefault(client, asyncio.Lock())

    async def offload(self, client: str, items: Iterable[T], size: int) -> list[T]:
        """All of `items`, made as `offload` does; where they are many bytes, in the client's turn. Where nobody waits any more, the
        one that is being made is the last, and the turn ends with it: a thread cannot be stopped."""
        if size <= SMALL:
            return list(items)
        over, turn = threading.Event(), self.of(client)
        await turn.acquire()
        making = asyncio.ensure_future(asyncio.to_thread(lambda: list(takewhile(lambda _: not over.is_set(), items))))
        making.add_done_callback(lambda _: turn.release())
        try:
            return await asyncio.shield(making)
        finally:
            over.set()


async def offload(work: Callable[[], T], size: int) -> T:
    """What `work` returns; where it handles many bytes, in a thread beside the event loop."""
    return work() if size <= SMALL else await asyncio.to_thread(work)
