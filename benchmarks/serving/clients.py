"""A real server process on loopback, and lean clients of it, so that what is timed is the server and hardly the client.

HTTP is the standard library's http.client on a connection that is kept; the WebSocket is websockets.sync without
compression, whose thread hands each message over. Both parse an answer's JSON; none unpacks a picture while it is timed.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ImagineFlashError
from ...engine import GenerateRequest
from ...engine.work import GenerateResult
from ..processes import COMMAND, own_mb, resident_mb

GENERATIONS = "/v1/images/generations"
NO_ANSWER_AFTER = 60.0  # seconds until a server that does not answer is an error
STARTS_WITHIN = 200.0  # seconds until one that does not start is, on a machine that does much else


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that is ready to draw. log: what it wrote."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """A number of /metrics. Raises ImagineFlashError."""
        with HttpClient(self.port) as client:
            _, text = client.get("/metrics")
        found = re.search(rf"^{name} (\S+)$", text.decode(), re.MULTILINE)
        if found is None:
            raise ImagineFlashError(f"the server's /metrics has no {name}; measure a server of this version")
        return float(found[1])

    def pictures(self) -> float:
        """How many it has drawn so far."""
        return self.metric("imagine_flash_pictures_total")

    def memory(self) -> tuple[float, float]:
        """What is resident of it and the processes that read uploads, and of that what is no page of a file, in 10^6 bytes."""
        processes = [self.process.pid, *self.readers()]
        return sum(map(resident_mb, processes)), sum(map(own_mb, processes))

    def grown(self, before: tuple[float, float]) -> dict[str, float]:
        """By how much its memory is larger than `before`."""
        names = ("MB grown", "own MB grown")
        return {name: round(now - then, 1) for name, now, then in zip(names, self.memory(), before, strict=True)}

    def readers(self) -> list[int]:
        """The processes that read uploads, by id."""
        from psutil import NoSuchProcess, Process

        try:
            return [child.pid for child in Process(self.process.pid).children()]
        except NoSuchProcess:
            return []

    def last_words(self) -> str:
        """The last line that it wrote, to say what became of it."""
        return (self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]


@contextmanager
def serving(model: Path, backend: str, *further: str, max_queue: int) -> Iterator[Server]:
    """`imagine-flash serve` in a process of its own, at a free port, until the end of the block; further: options.

    Raises ImagineFlashError.
    """
    options = ["serve", "--port", "0", "--model", str(model), "--backend", backend, "--max-queue", str(max_queue)]
    with tempfile.TemporaryDirectory(prefix="imagine-flash-serve-") as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as written:
            process = subprocess.Popen([*COMMAND, *options, *further], stdout=written, stderr=written)
        try:
            yield _ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(NO_ANSWER_AFTER)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path) -> Server:
    """Waits until it has said where it listens, and its model is warm."""
    limit = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < limit and process.poll() is None:
        said = re.search(r"^http://127\.0\.0\.1:(\d+)\s*$", log.read_text(encoding="utf-8"), re.MULTILINE)
        if said is not None:
            server = Server(port=int(said[1]), process=process, log=log)
            with suppress(OSError), HttpClient(server.port) as client:
                if client.get("/readyz")[0] == 200:
                    return server
        time.sleep(0.05)
    last = Server(port=0, process=process, log=log).last_words()
    raise ImagineFlashError(f"the server to measure did not start: {last}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One picture over a wire. seconds: from the call to the parsed answer; total: the engine's own, as the answer says.
    file: the picture's, over HTTP still as base64."""

    seconds: float
    total: float
    seed: int
    file: str | bytes

    def pixels(self) -> NDArray[np.uint8]:
        """The (H, W, 3)."""
        from PIL import Image

        data = base64.b64decode(self.file) if isinstance(self.file, str) else self.file
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


Drawn = Answer | GenerateResult


def pixels_of(drawn: Drawn) -> NDArray[np.uint8]:
    """The (H, W, 3) of an answer, or of a result in this process."""
    return drawn.pixels() if isinstance(drawn, Answer) else drawn.images[0]


class HttpClient:
    """One connection that is kept; opened again after an error."""

    def __init__(self, port: int, key: str = "") -> None:
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=NO_ANSWER_AFTER)

    def connect_again(self) -> None:
        """On a new connection with the next request: a server closes one that has rested for a minute."""
        self._connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises OSError."""
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def post(self, request: GenerateRequest) -> tuple[int, Answer | None]:
        """The status, 0 where there was none, and with 200 the answer."""
        sent = json.dumps(_fields(request)).encode()
        started = time.perf_counter()
        try:
            self._connection.request("POST", GENERATIONS, sent, self._headers)
            answer = self._connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                return answer.status, None
            found = json.loads(body)
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return 0, None
        seconds = time.perf_counter() - started
        (data,) = found["data"]
        total, seed = found["timings"]["total"], data["seed"]
        return 200, Answer(seconds=seconds, total=total, seed=seed, file=data["b64_json"])

    def draw(self, request: GenerateRequest) -> Answer:
        """The answer to a request that must succeed. Raises ImagineFlashError."""
        status, answer = self.post(request)
        if answer is None:
            raise ImagineFlashError(f"the server answered a good request with {status or 'nothing'}; its log says why")
        return answer

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _fields(request: GenerateRequest) -> dict[str, object]:
    return {"prompt": request.prompt, "seed": request.seed, "steps": request.steps}


class StreamClient:
    """One WebSocket; requests are numbered from 1 in the order of `send`."""

    def __init__(self, port: int) -> None:
        from websockets.sync.client import connect

        plain = socket.create_connection(("127.0.0.1", port), NO_ANSWER_AFTER)  # given, no proxy is asked for
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connect(f"ws://127.0.0.1:{port}/v1/stream", sock=plain, compression=None, max_size=None)
        self.newest = 0
        self._socket.recv(NO_ANSWER_AFTER)  # "ready"

    def send(self, request: GenerateRequest) -> int:
        """Asks for a picture; its number."""
        self.newest += 1
        asked = {"prompt": request.prompt, "seed": request.seed, "steps": request.steps, "format": "png"}
        self._socket.send(json.dumps({"seq": self.newest, **asked}))
        return self.newest

    def receive(self, timeout: float = NO_ANSWER_AFTER) -> tuple[int, Answer]:
        """The next picture and its number; `seconds` is 0. Raises TimeoutError, ImagineFlashError."""
        message = self._socket.recv(timeout)
        if isinstance(message, str):
            raise ImagineFlashError(f"the server answered a good request with {message[:200]}")
        (length,) = struct.unpack(">I", message[:4])
        header: dict[str, Any] = json.loads(message[4 : 4 + length])
        total = header["timings"]["total"]
        return header["seq"], Answer(seconds=0, total=total, seed=header["seed"], file=message[4 + length :])

    def draw(self, request: GenerateRequest) -> Answer:
        """Asks and waits. Raises ImagineFlashError."""
        started = time.perf_counter()
        self.send(request)
        _, answer = self.receive()
        seconds = time.perf_counter() - started
        return Answer(seconds=seconds, total=answer.total, seed=answer.seed, file=answer.file)

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
