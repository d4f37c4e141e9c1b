"""Uploaded pictures, read in worker processes that are killed where they take too long: a file of 100 KB may be a minute's work."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import BusyError, RequestError
from ...folders.manifests import Size
from .files import Turns

WORKERS, MOST_WAITING = 2, 8
SECONDS = 1.8  # for one picture
FREED_AT_ONCE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1000000",
}  # else glibc keeps some 64 MB of a picture
READER = Path(__file__).with_name("reader.py")
LOG = logging.getLogger(__name__)


class UploadReader:
    """A few worker processes, each reading one picture at a time; `start` begins them, before somebody waits for one.

    A client has one picture read at a time, so that nobody's slow ones take all workers.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._free: asyncio.Queue[Process] = asyncio.Queue()
        self._processes: set[Process] = set()
        self._beginning: set[asyncio.Task[None]] = set()
        self._there = Counter[str]()  # uploads that are read or wait, by client
        self._turns = Turns()

    def start(self) -> None:
        """As many as there are to be, in the event loop that asks for pictures; those that have died meanwhile are replaced."""
        self._processes = {process for process in self._processes if process.returncode is None}
        for _ in range(WORKERS - len(self._processes) - len(self._beginning)):
            task = asyncio.create_task(self._begin())
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def close(self) -> None:
        """End the workers, whatever they do."""
        for task in self._beginning:
            task.cancel()
        await asyncio.gather(*(self._end(process) for process in list(self._processes)))

    async def image(self, data: bytes, size: Size, client: str = "") -> NDArray[np.uint8]:
        """An uploaded picture as uint8 (H, W, 3) of `size`, scaled to cover it and cropped; transparency is on white. Raises
        RequestError, and BusyError where too many wait already."""
        return np.frombuffer(await self._read(data, "image", size, client), np.uint8).reshape(*size, 3)

    async def condition(self, data: bytes, size: Size, client: str = "") -> NDArray[np.uint8]:
        """An uploaded conditioning picture, likewise."""
        return np.frombuffer(await self._read(data, "condition", size, client), np.uint8).reshape(*size, 3)

    async def mask(self, data: bytes, size: Size, client: str = "") -> NDArray[np.float32]:
        """An uploaded mask as float32 (H, W): 1 is drawn anew. Raises as `image`."""
        shares = np.frombuffer(await self._read(data, "mask", size, client), np.uint8).reshape(size)
        return (shares / 255).astype(np.float32)

    async def _read(self, data: bytes, kind: str, size: Size, client: str) -> bytes:
        there, most = self._there.total(), WORKERS + MOST_WAITING
        if there >= most and self._there[client] >= most // len({*self._there, client}):
            raise BusyError(f"{there} uploads are read or wait already; try again later")
        self._there[client] += 1
        try:
            self.start()
            async with self._turns.of(client), self._worker() as worker, asyncio.timeout(SECONDS):
                wish = {"kind": kind, "size": size[::-1], "max_pixels": self._max_pixels, "bytes": len(data)}
                good, found = await _ask(worker, json.dumps(wish).encode(), data)
        except TimeoutError:
            raise RequestError(f"{kind} takes more than {SECONDS:g} seconds to unpack", param=kind) from None
        except (OSError, EOFError):
            raise RequestError(f"{kind} cannot be read: it ended the process that unpacked it", param=kind) from None
        finally:
            self._there -= Counter([client])  # which forgets those that have none
        if not good:
            raise RequestError(f"{kind} {found.decode()}", param=kind)
        return found

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[Process]:
        """A free one; it is killed where it does not answer, and where nobody waits for its answer any more."""
        while (process := await self._free.get()).returncode is not None:  # it died while it had nothing to do
            self.start()
        try:
            yield process
        except BaseException:
            await asyncio.shield(self._end(process))
            self.start()
            raise
        self._free.put_nowait(process)

    async def _begin(self) -> None:
        while True:
            try:
                command = [sys.executable, "-I", str(READER)]
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=DEVNULL,
                    start_new_session=True,
                    env={**os.environ, **FREED_AT_ONCE},
                )
                self._processes.add(process)
                return self._free.put_nowait(process)
            except OSError as error:
                LOG.error("no process to read uploads can be started: %s", error)
                await asyncio.sleep(1)

    async def _end(self, process: Process) -> None:
        self._processes.discard(process)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _ask(worker: Process, head: bytes, data: bytes) -> tuple[bool, bytes]:
    """Whether it could be read; the pixels, or what is wrong. Raises OSError and EOFError where the worker ended."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(struct.pack(">I", len(head)) + head)
    worker.stdin.write(data)
    await worker.stdin.drain()
    good, length = struct.unpack(">BI", await worker.stdout.readexactly(5))
    return bool(good), await worker.stdout.readexactly(length)
