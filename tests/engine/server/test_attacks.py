"""What strangers do at length, and what stays of it: memory, other people's pictures, the server's end."""

import io
import json
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from imagine_flash.tests.engine.pictures.test_uploads import png as png_of_chunks
from imagine_flash.tests.engine.pictures.test_uploads import repeated_scans
from imagine_flash.tests.engine.server.conftest import ServerProcess, png
from imagine_flash.tests.engine.server.malformed import KINDS, malformed
from imagine_flash.tests.engine.server.refusals import outcome

pytestmark = [pytest.mark.slow, pytest.mark.weekly]
GREEDY, MODEST = "greedy-client-of-tests", "modest-client-of-tests"  # their keys
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SETTLED = 100 * len(KINDS)  # malformed requests until memory is what it stays
CLIENTS = 12


def png_of_one_row() -> bytes:
    """As many pixels as are unpacked, in 62 KB."""
    data = zlib.compress(bytes(1 + 4 * 16_000_000))
    return png_of_chunks((b"IDAT", data), width=16_000_000, height=1, colour=6)


def webp_of_one_colour() -> bytes:
    """As many pixels as are unpacked, in 714 bytes."""
    file = io.BytesIO()
    Image.new("RGBA", (4096, 4096), (1, 2, 3, 4)).save(file, "WEBP", lossless=True)
    return file.getvalue()


SLOW_FILES: dict[str, Callable[[], bytes]] = {
    "PNG": png_of_one_row,
    "JPEG": lambda: repeated_scans(50),
    "WebP": webp_of_one_colour,
}


@pytest.fixture
def options(tiny_artifact: Path) -> tuple[str | Path, ...]:
    return ("--model", tiny_artifact, "--backend", "onnxruntime", "--max-queue", "128")


@pytest.fixture
def shared(start_server, options: tuple[str | Path, ...], tmp_path: Path) -> ServerProcess:
    """A server for two clients with keys."""
    keys = tmp_path / "keys"
    keys.write_text(f"{GREEDY}\n{MODEST}")
    return start_server(*options, "--api-key-file", keys)


def client_of(server: ServerProcess, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {key}"})


def edit(http: httpx.Client, file: bytes) -> httpx.Response:
    return http.post(EDITS, data={"prompt": "a fox", "seed": "7", "strength": "0.5"}, files={"image": ("a", file)})


def readers_of(server: ServerProcess) -> list[int]:
    """The processes that read uploads, by id."""
    try:
        return [child.pid for child in psutil.Process(server.process.pid).children()]
    except psutil.NoSuchProcess:
        return []


def own_mb(server: ServerProcess) -> float:
    """What is resident of the server and its readers and is no page of a file, in 10^6 bytes."""
    memories = [psutil.Process(pid).memory_info() for pid in (server.process.pid, *readers_of(server))]
    return sum(memory.rss - getattr(memory, "shared", 0) for memory in memories) / 1e6


@contextmanager
def two_who_send(server: ServerProcess, file: bytes) -> Iterator[list[int]]:
    """Two connections of one client that have it edited again and again; the statuses of the answers."""
    over, statuses = threading.Event(), list[int]()

    def send() -> None:
        with client_of(server, GREEDY) as http, suppress(httpx.TransportError):  # the server has ended
            while not over.is_set():
                statuses.append(edit(http, file).status_code)

    with ThreadPoolExecutor(2) as pool:
        sending = [pool.submit(send) for _ in range(2)]
        try:
            yield statuses
        finally:
            over.set()
        for one in sending:
            one.result()


def test_malformed_requests_leave_nothing_behind(server: ServerProcess) -> None:
    """Clients that closed with a part of the answer unread left 25 kB each, for 75 seconds."""
    for sent in malformed(SETTLED, seed=1):
        outcome(server.port, sent)
    before = own_mb(server)
    for sent in malformed(5000, seed=0):
        outcome(server.port, sent)
    assert own_mb(server) - before < 20


@pytest.mark.parametrize("kind", SLOW_FILES)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_beside_slow_files_others_edit_as_before(shared: ServerProcess, kind: str) -> None:
    file, own, peak = SLOW_FILES[kind](), png(np.full((64, 64, 3), 99, np.uint8)), 0
    with client_of(shared, MODEST) as http:
        before = edit(http, own).json()["data"][0]["b64_json"]
        for pid in readers_of(shared):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
        with two_who_send(shared, file) as statuses:
            limit = time.monotonic() + 120
            while len(statuses) < 4:
                assert time.monotonic() < limit
                answer = edit(http, own)
                assert answer.status_code == 200 and answer.json()["data"][0]["b64_json"] == before
                for pid in readers_of(shared):
                    with suppress(OSError):  # it ended meanwhile
                        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
                        peak = max(peak, 1024 * int(found[1]) if found else 0)
    assert all(200 <= status < 500 for status in statuses), statuses
    assert 10e6 < peak <= 330e6


def draw_on(server: ServerProcess, announced: threading.Event) -> int:
    """Pictures until the server is gone; it may be gone only for a request sent after the end was announced."""
    drawn = 0
    with client_of(server, MODEST) as http:
        while True:
            late = announced.is_set()
            try:
                answer = http.post(GENERATIONS, json={"prompt": "a cat", "steps": 1})
            except httpx.TransportError:
                assert late
                return drawn
            if answer.status_code == 429:
                time.sleep(0.02)
            else:
                assert answer.status_code == 200 or (answer.status_code == 503 and late), answer.text
                drawn += answer.status_code == 200


def type_on(server: ServerProcess, announced: threading.Event) -> int:
    """The same over the stream, which ends with the code that tells pages to come again."""
    drawn, key = 0, {"Authorization": f"Bearer {MODEST}"}
    with connect(f"ws://127.0.0.1:{server.port}/v1/stream", additional_headers=key, max_size=None) as stream:
        assert "ready" in str(stream.recv(20))
        try:
            while True:
                stream.send(json.dumps({"seq": drawn + 1, "prompt": "a cat", "steps": 1}))
                assert isinstance(stream.recv(60), bytes)
                drawn += 1
        except ConnectionClosed as closed:
            assert closed.rcvd is not None and closed.rcvd.code == 1012
    return drawn


def ends_by_itself(server: ServerProcess, announced: threading.Event) -> None:
    """A moment after its end was announced; one that does not is killed, so that its clients end too."""
    announced.set()
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    try:
        assert server.process.wait(60) == -signal.SIGTERM
    finally:
        server.kill()


def ask_for_64(server: ServerProcess, announced: threading.Event) -> int:
    """The one greedy client, in a loop."""
    answered = 0
    with client_of(server, GREEDY) as http, suppress(httpx.TransportError):
        while True:
            answered += http.post(GENERATIONS, json={"prompt": "a fox", "n": 64}).status_code == 200
    return answered


@pytest.mark.parametrize("beside", ["typing", "slow files", "a greedy client"])
def test_sigterm_in_the_midst_of_it(shared: ServerProcess, beside: str) -> None:
    """The server ends by itself and soon, and what it had accepted is drawn."""
    announced = threading.Event()
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        ask = type_on if beside == "typing" else draw_on
        clients: list[Future[int]] = [pool.submit(ask, shared, announced) for _ in range(CLIENTS)]
        if beside == "a greedy client":
            clients.append(pool.submit(ask_for_64, shared, announced))
        with two_who_send(shared, repeated_scans(50)) if beside == "slow files" else nullcontext():
            time.sleep(2)
            ends_by_itself(shared, announced)
        answered = [client.result() for client in clients]
    assert all(answered), answered
    assert "Traceback" not in shared.log.read_text()


def test_sigterm_among_malformed_requests(start_server, options: tuple[str | Path, ...]) -> None:
    """Only a server that ends may leave one without an answer."""
    server, announced, sent = start_server(*options), threading.Event(), []

    def send(seed: int) -> None:
        for one in malformed(10**6, seed):
            try:
                sent.append(outcome(server.port, one))
            except (AssertionError, OSError):
                assert announced.is_set()
                return

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(send, seed) for seed in range(CLIENTS)]
        time.sleep(2)
        ends_by_itself(server, announced)
        for client in clients:
            client.result()
    assert len(sent) > 100 and "Traceback" not in server.log.read_text()
