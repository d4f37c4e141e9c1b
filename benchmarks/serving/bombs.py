"""Small files that are much work to read, one of each format that is accepted: what they do to the edits of others."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Event, Thread

import numpy as np

from ...core.errors import ImagineFlashError
from ...engine import GenerateRequest
from ..harness import case_of
from ..schema import Case
from .bench import Bench
from .clients import Answer, HttpClient, Server, serving
from .greedy import GREEDY, MODEST, keys_of

ALONE = "alone"
AT_ONCE = 2  # connections of the one who sends bombs: as many as there are processes that read


def png_bomb() -> bytes:
    """As many pixels as are unpacked, in one row: 62 KB."""
    return png((b"IDAT", zlib.compress(bytes(1 + 4 * 16_000_000))), width=16_000_000, height=1, colour=6)


def png(*chunks: tuple[bytes, bytes], width: int, height: int, colour: int = 2) -> bytes:
    """A file of these chunks, 8 bits a channel; colour: 2 is RGB, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


@cache
def jpeg_bomb(scans: int = 50, side: int = 4000) -> bytes:
    """A progressive JPEG whose last scan comes again and again: 96 KB of it took 13 seconds, 366 KB 108."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((side, side), 0).convert("RGB").save(file, "JPEG", progressive=True, quality=50)
    data = file.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scans * last + b"\xff\xd9"


def webp_bomb() -> bytes:
    """As many pixels as are unpacked, in 714 bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (4096, 4096), (1, 2, 3, 4)).save(file, "WEBP", lossless=True)
    return file.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {"PNG": png_bomb, "JPEG": jpeg_bomb, "WebP": webp_bomb}


@dataclass
class _Sent:
    """What became of the bombs of one format. alone: seconds of the first, with nothing else of its sender; statuses: of the
    answers; peak: bytes of the largest process that read one."""

    alone: float = 0.0
    statuses: list[int] = field(default_factory=list)
    peak: int = 0

    def numbers(self) -> dict[str, float]:
        if min(self.statuses) < 200 or max(self.statuses) >= 500:
            raise ImagineFlashError(
                f"bombs were answered with {sorted(set(self.statuses))}; each must be drawn or refused"
            )
        return {"bombs": len(self.statuses), "s alone": round(self.alone, 2), "peak MB": round(self.peak / 1e6, 1)}


def beside_bombs(bench: Bench, rounds: int) -> Case:
    """Seconds of an edit in the most steps, alone and while somebody with another key sends bombs, two at a time. "s alone": of the
    first bomb; "peak MB": of a process that read one. Raises ImagineFlashError."""
    request, file = an_edit(bench)
    seconds: dict[str, list[float]] = {}
    answers: dict[str, list[Answer]] = {}
    sent: dict[str, _Sent] = {}
    with ExitStack() as opened:
        options = ("--api-key-file", str(opened.enter_context(keys_of(GREEDY, MODEST))))
        server = opened.enter_context(serving(bench.folder, bench.engine.backend.name, *options, max_queue=64))
        client = opened.enter_context(HttpClient(server.port, MODEST))
        _edit(client, request, file)
        for name in (ALONE, *BOMBS):
            with ExitStack() as running:
                if name != ALONE:
                    sent[name] = running.enter_context(Bomber(server, BOMBS[name](), request))
                seconds[name], answers[name] = [], []
                for _ in range(rounds):
                    started = time.perf_counter()
                    answers[name].append(_edit(client, request, file))
                    seconds[name].append(time.perf_counter() - started)
    checks = {name: bench.check([one.pixels() for one in own[:3]], [request] * 3) for name, own in answers.items()}
    about = bench.about("edits beside bombs", steps=request.steps, bombs_at_once=AT_ONCE)
    case = case_of(seconds, baseline=ALONE, checks=checks, case=about)
    return case.with_extra({name: one.numbers() for name, one in sent.items()})


def _edit(client: HttpClient, request: GenerateRequest, file: bytes) -> Answer:
    status, answer = client.edit(request, file)
    if answer is None:
        raise ImagineFlashError(f"the server answered a good edit with {status or 'nothing'}; its log says why")
    return answer


def an_edit(bench: Bench) -> tuple[GenerateRequest, bytes]:
    """A request that draws from a picture in the most steps, and the picture's file."""
    from PIL import Image

    pixels, file = np.random.default_rng(0).integers(0, 256, (*bench.engine.sizes[0], 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    steps = max(bench.engine.steps)
    return GenerateRequest(prompt="a fox", seed=7, steps=steps, image=pixels, strength=0.5), file.getvalue()


class Bomber:
    """Sends a bomb to be edited again and again until the end of the block; once alone, before it begins."""

    def __init__(self, server: Server, bomb: bytes, request: GenerateRequest) -> None:
        self._server, self._bomb, self._request = server, bomb, request
        self._sent, self._over = _Sent(), Event()
        self._threads = [Thread(target=self._send_on) for _ in range(AT_ONCE)]
        self._watcher = Thread(target=self._watch)

    def __enter__(self) -> _Sent:
        self._watcher.start()
        started = time.perf_counter()
        with HttpClient(self._server.port, GREEDY) as client:
            self._send(client)
        self._sent.alone = time.perf_counter() - started
        for thread in self._threads:
            thread.start()
        return self._sent

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in (*self._threads, self._watcher):
            thread.join()

    def _send_on(self) -> None:
        with HttpClient(self._server.port, GREEDY) as client:
            while not self._over.is_set():
                self._send(client)

    def _send(self, client: HttpClient) -> None:
        self._sent.statuses.append(client.edit(self._request, self._bomb)[0])

    def _watch(self) -> None:
        """Linux keeps the most memory that each process had, since it was told to forget it."""
        for pid in self._server.readers():
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
        while not self._over.wait(0.01):
            for pid in self._server.readers():
                with suppress(OSError):  # it ended meanwhile
                    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
                    if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                        self._sent.peak = max(self._sent.peak, 1024 * int(found[1]))
