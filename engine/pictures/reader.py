"""Reads strangers' pictures in a process of its own, which may be killed. Run as a script, it imports nothing of the package.

Standard input: requests, each 4 bytes with the length of a JSON head, the head, and the file. Standard output: answers, each one
byte (1: pixels, 0: what is wrong, in words), 4 bytes with a length, and that many bytes.
"""

import io
import json
import os
import struct
import sys
from typing import BinaryIO

from PIL import Image, ImageOps

READ = ("PNG", "JPEG", "WEBP")  # formats whose readers are opened for strangers; MPO, as phones write it, is a JPEG
MOST_SCANS = 64  # of a JPEG; cameras and programs write a dozen
MOST_FRAMES = 64  # of an animation, of which the first is taken
MEMORY = 300_000_000  # bytes, with what the process has when it begins
Size = tuple[int, int]  # width, height


class Unreadable(Exception):
    """What is wrong with a file, in words that go after its name."""


def read_picture(data: bytes, kind: str, size: Size, max_pixels: int, formats: tuple[str, ...] | None = READ) -> bytes:
    """The pixels of a picture file, scaled to cover `size` and cropped to it. image, condition: RGB, transparency on white;
    "mask": one channel, 255 is drawn anew: where it has transparency, that (as OpenAI's API defines it), else what is white.
    formats: that are opened, Pillow's names; None: all. Raises Unreadable.
    """
    try:
        picture = _open(data, size, max_pixels, formats)
        return (_mask if kind == "mask" else _rgb)(picture, size).tobytes()
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"has far more than the {max_pixels:,} pixels that are unpacked") from None
    except MemoryError:
        raise Unreadable("takes too much memory to unpack") from None
    except Exception as error:  # whatever damaged bytes make a reader raise
        raise Unreadable(f"is no PNG, JPEG or WebP that can be read ({type(error).__name__})") from None


def _open(data: bytes, size: Size, max_pixels: int, formats: tuple[str, ...] | None) -> Image.Image:
    """The picture as it is looked at, not much larger than it need be; measured before it is unpacked."""
    found = Image.open(io.BytesIO(data), formats=formats)  # reads the header alone
    if found.width * found.height > max_pixels:
        raise Unreadable(f"has {found.width}x{found.height} pixels; at most {max_pixels:,} are unpacked")
    if (frames := getattr(found, "n_frames", 1)) > MOST_FRAMES:
        raise Unreadable(f"has {frames} frames; at most {MOST_FRAMES} are looked at, and the first is taken")
    if found.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > MOST_SCANS:
        raise Unreadable(f"has {scans} scans; at most {MOST_SCANS} are unpacked")
    found.draft("RGB", (max(size), max(size)))  # a JPEG in an eighth, a quarter or half of its size
    found.load()
    found = ImageOps.exif_transpose(found)
    if found.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off
        found = found.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif found.mode in ("P", "PA"):
        found = found.convert("RGBA" if _has_alpha(found) else "RGB")
    smaller = min(found.width // size[0], found.height // size[1])
    return found.reduce(smaller) if smaller > 1 else found


def _rgb(picture: Image.Image, size: Size) -> Image.Image:
    if _has_alpha(picture):
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return _fit(picture.convert("RGB"), size)


def _mask(mask: Image.Image, size: Size) -> Image.Image:
    if _has_alpha(mask):
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):  # else a channel that says nothing, as most programs write it
            return ImageOps.invert(_fit(alpha, size))
    return _fit(mask.convert("L"), size)


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def _fit(picture: Image.Image, size: Size) -> Image.Image:
    return picture if picture.size == size else ImageOps.fit(picture, size)


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as statm:
            reserved, taken = (int(pages) * resource.getpagesize() for pages in statm.read().split()[:2])
        limit = reserved + MEMORY - taken  # the system limits what is reserved
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):  # not Linux: the limits of time and pixels are left
        pass


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Answers one request after the other, until there are no more."""
    Image.init()
    _limit_memory()
    if hasattr(os, "nice"):
        os.nice(5)  # drawing goes before
    while len(head := asked.read(4)) == 4:
        request = json.loads(asked.read(*struct.unpack(">I", head)))
        data = asked.read(request.pop("bytes"))
        try:
            good, found = 1, read_picture(data, request["kind"], tuple(request["size"]), request["max_pixels"])
        except Unreadable as error:
            good, found = 0, str(error).encode()
        answers.write(struct.pack(">BI", good, len(found)) + found)
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
