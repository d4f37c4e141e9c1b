"""A real server process on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest


@dataclass
class ServerProcess:
    """`imagine-flash serve` with these options, at a port that stays the same when it is started again."""

    options: tuple[str | Path, ...]
    log: Path  # of standard output and error, of all its starts
    port: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, seconds: float = 60) -> "ServerProcess":
        """Waits until it is ready to draw; 0 seconds: for nothing."""
        code = "from imagine_flash.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", "--port", str(self.port), *map(str, self.options)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "COLUMNS": "200"})
        limit = time.monotonic() + seconds
        while seconds and not self._ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < limit, f"not ready in {seconds} s: {self.log.read_text()}"
            time.sleep(0.05)
        return self

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, seconds: float = 30) -> int:
        """Its exit code; for good after `seconds`."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.wait()

    def kill(self) -> None:
        """As a crash would end it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One that draws with small random weights, shared by the tests of a module."""
    options = ("--model", tiny_artifact, "--backend", "onnxruntime")
    one = ServerProcess(options, tmp_path_factory.mktemp("server") / "log")
    try:
        yield one.start()
    finally:
        one.stop()


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Starts one with the options given; by default the embedded model's. They end with the module's tests."""
    started: list[ServerProcess] = []

    def start(*options: str | Path, seconds: float = 60) -> ServerProcess:
        one = ServerProcess(options, tmp_path_factory.mktemp("server") / "log")
        started.append(one)
        return one.start(seconds)

    yield start
    for one in started:
        one.stop()
