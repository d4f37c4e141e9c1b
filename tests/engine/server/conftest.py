"""A real server process on loopback."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from imagine_flash.tests.commands import CHROMIUM


@dataclass
class ServerProcess:
    """`imagine-flash serve` with these options, at a port that stays the same when it is started again."""

    options: tuple[str | Path, ...]
    log: Path  # of standard output and error, of all its starts
    port: int = 0
    before: str = ""  # code that runs in its process first
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
        code = self.before + "from imagine_flash.cli import main; main()"
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

    def start(*options: str | Path, seconds: float = 60, before: str = "") -> ServerProcess:
        one = ServerProcess(options, tmp_path_factory.mktemp("server") / "log", before=before)
        started.append(one)
        return one.start(seconds)

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    """OpenAI's, without its own retries."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


async def post(app: Any, body: dict[str, object], gone: asyncio.Event, path: str = "/v1/images/generations") -> bytes:
    """What an application sends, the status before it, to a client that hangs up once it is `gone`, and sets this itself at the
    end of the answer."""
    sent, unread = [], [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, object]:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", str(message.get("status", "")).encode()))
        if message["type"] == "http.response.body" and not message.get("more_body"):
            gone.set()
        await asyncio.sleep(0)

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http", "headers": headers}
    await app({**scope, "client": ("192.0.2.1", 50_000), "server": ("localhost", 80)}, receive, send)
    return b"".join(sent)


def png(pixels: np.ndarray) -> bytes:
    """A file of pixels (H, W, 3 or 4)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(data: str | bytes) -> Image.Image:
    """Of a file, or of its base64."""
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


LOG_OF_PICTURES = """
window.seen = [];
addEventListener("DOMContentLoaded", () => {
  const picture = document.getElementById("picture");
  if (!picture) return;
  new MutationObserver(() => {
    const { seq, prompt, preview, seed } = picture.dataset;
    seen.push({ seq: Number(seq), prompt, preview: preview === "true", seed, images: picture.querySelectorAll("img").length });
  }).observe(picture, { attributes: true, attributeFilter: ["data-seq"] });
});
"""


@pytest.fixture(scope="module")
def embedded(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """One that draws with the embedded model."""
    return start_server()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    playwright.expect.set_options(timeout=20_000)  # as long as a page waits here for all else
    with playwright.sync_playwright() as started:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        one = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield one
        one.close()


class Opened:
    """A page, and what it did that no page should: messages on the console, requests to others."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.console: list[str] = []
        self.others: list[str] = []
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._asked(request.url, url))
        self.page.on("websocket", lambda socket: self._asked(socket.url.replace("ws://", "http://"), url))
        self.page.add_init_script(LOG_OF_PICTURES)
        self.url = url

    def _asked(self, target: str, own: str) -> None:
        if not target.startswith((f"{own}/", "blob:", "data:")):
            self.others.append(target)

    def go(self, fragment: str = "") -> "Opened":
        self.page.goto(f"{self.url}/{fragment}")
        return self

    def shows(self, prompt: str, seed: int | None = None) -> None:
        """Waits for the full picture of that text."""
        wanted = f'#picture[data-prompt="{prompt}"][data-preview="false"]'
        self.page.wait_for_selector(wanted + (f'[data-seed="{seed}"]' if seed is not None else "") + " img")

    def seen(self) -> list[dict[str, Any]]:
        return self.page.evaluate("seen")

    def says(self, selector: str, text: str) -> None:
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_contain_text(text, timeout=20_000)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    opened: list[Opened] = []

    def start(url: str, **options: Any) -> Opened:
        opened.append(Opened(browser, url, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.context.close()
