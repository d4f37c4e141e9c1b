"""Clients that hang up, stall, upload too much or come from elsewhere; and pages that may come from elsewhere."""

import asyncio
import concurrent.futures
import io
import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from imagine_flash.engine import Engine
from imagine_flash.engine.pictures.files import encode
from imagine_flash.engine.server import create_app
from imagine_flash.engine.server.settings import ServerSettings
from imagine_flash.tests.engine.server.conftest import post


def test_a_strangers_name_for_this_machine_is_a_stranger(http: httpx.Client, server) -> None:
    """DNS rebinding: the page and the request agree on a name, and the name leads here."""
    for name, status in (("evil.example", 403), ("localhost", 200), ("0.0.0.0", 200), ("127.0.0.1", 200)):
        there = f"{name}:{server.port}"
        headers = {"host": there, "origin": f"http://{there}"}
        answer = http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1}, headers=headers)
        assert answer.status_code == status, name


def test_nor_may_a_stranger_read_by_such_a_name(tiny_artifact) -> None:
    """What reads says no origin: such a page could read /v1/models and /metrics. A proxy's name is allowed as its pages are."""
    settings = ServerSettings(allow_origin=("https://draw.example.org",))
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        http, everybodys = (
            TestClient(create_app(engine, known), base_url="http://127.0.0.1:8000")
            for known in (settings, ServerSettings(host="0.0.0.0"))
        )
        for path in ("/v1/models", "/metrics", "/sdapi/v1/progress", "/v1/nothing"):
            answer = http.get(path, headers={"host": "evil.example:8000"})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden_host", path
            assert everybodys.get(path, headers={"host": "evil.example:8000"}).status_code != 403
        for host in ("draw.example.org", "localhost:8000", "app.localhost", "[::1]:8000", "[::ffff:127.0.0.1]:80"):
            assert http.get("/v1/models", headers={"host": host}).status_code == 200, host
        for path in ("/", "/page/app.js", "/docs", "/openapi.json", "/healthz", "/readyz"):
            assert http.get(path, headers={"host": "evil.example"}).status_code == 200, path
        allowed = {"host": "drawing", "origin": "https://draw.example.org"}
        assert http.get("/v1/models", headers=allowed).status_code == 200


def raw_request(server, body: bytes, length: int) -> socket.socket:
    """A client that has sent this much of its body."""
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {length}\r\n\r\n".encode() + body)
    return connection


def test_a_client_that_hangs_up_stops_its_work_in_one_line_of_the_log(http: httpx.Client, server) -> None:
    body = json.dumps({"prompt": "a cat", "n": 64}).encode()  # 16 are drawn within 70 ms here and there
    connection = raw_request(server, body, len(body))
    time.sleep(0.05)
    connection.close()
    limit = time.monotonic() + 20
    while '"status": 499' not in server.log.read_text():
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert "Traceback" not in server.log.read_text()
    while "imagine_flash_waiting_pictures 0.0" not in http.get("/metrics").text:
        assert time.monotonic() < limit


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_files_are_written_for_nobody_who_hung_up_and_for_nobody_too_long(
    tiny_artifact, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """All of them were, however long it took; and what the same client asked for next waited, small as it was."""
    written, writing, go = [], threading.Event(), threading.Event()

    def slow(*given: Any) -> bytes:
        if given[0].nbytes > 64 * 64 * 3:
            written.append(given)
            writing.set()
            assert go.wait(20)
        return encode(*given)

    async def ask() -> None:
        large = {"prompt": "a cat", "steps": 1, "n": 20, "size": "512x512", "batch_size": 20}
        small = {"prompt": "a cat", "steps": 1, "width": 64, "height": 64}
        large, small = ({name: value for name, value in one.items() if known(name)} for one in (large, small))
        app, hurried = (create_app(engine, ServerSettings(timeout=seconds)) for seconds in (60, 1.5))
        gone = asyncio.Event()
        asked = asyncio.create_task(post(app, large, gone, path))
        assert await asyncio.to_thread(writing.wait, 20)
        assert (await post(app, small, asyncio.Event(), path)).startswith(b"200")
        gone.set()
        assert (await asked).startswith(b"499")
        assert (await post(hurried, large, asyncio.Event(), path)).startswith(b"504")
        go.set()

    def known(name: str) -> bool:
        return name not in (("batch_size", "width", "height") if path.startswith("/v1") else ("n", "size"))

    monkeypatch.setattr("imagine_flash.engine.server.drawing.encode", slow)
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        asyncio.run(ask())
    assert len(written) <= 2, "the file that was being written was the last"


def test_who_has_only_stopped_sending_gets_the_answer(server) -> None:
    """It was taken for somebody who had hung up."""
    body = json.dumps({"prompt": "a cat", "steps": 1}).encode()
    with raw_request(server, body, len(body)) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while more := connection.recv(9999):
            answer += more
    assert b"HTTP/1.1 200 OK" in answer and b"b64_json" in answer


def test_a_body_that_drips_comes_to_an_end(start_server, tiny_artifact, tmp_path) -> None:
    """One byte in eight seconds kept a connection open for ever."""
    (tmp_path / "settings").write_text("body-timeout: 1\nmax-connections: 8\n")
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", "--config", tmp_path / "settings")
    with raw_request(server, b"{", 1000) as connection:
        answer, limit = b"", time.monotonic() + 20
        while b"rest of the request" not in answer:
            with suppress(OSError):
                connection.sendall(b" ")
            connection.settimeout(0.2)
            with suppress(TimeoutError):
                answer += connection.recv(2000)
            assert time.monotonic() < limit
    assert b" 408 " in answer and b"1 seconds without the rest" in answer
    slow = [raw_request(server, b"{", 1000) for _ in range(20)]  # more than there may be: the slowest make room
    assert httpx.get(f"{server.url}/healthz", timeout=10).text == "ok"
    for connection in slow:
        connection.close()
    assert "8 connections are open, the most there may be" in server.log.read_text()


def test_half_a_body_is_not_waited_for(start_server, tiny_artifact) -> None:
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", "--timeout", "1")
    with raw_request(server, b"{", 100) as connection:
        answer = b""
        while b"rest of the request" not in answer and (more := connection.recv(2000)):
            answer += more
    assert b" 408 " in answer and b"1 seconds without the rest of the request" in answer
    with raw_request(server, b"{", 100):
        started = time.monotonic()
        assert server.stop() in (0, -15) and time.monotonic() - started < 10
    assert "Traceback" not in server.log.read_text()


def test_uploads_are_unpacked_beside_everything_else_and_only_so_many(server) -> None:
    """24 edits at once stopped every other request until they were unpacked."""
    big = Image.new("RGBA", (3000, 3000), (1, 2, 3, 128))
    buffer = io.BytesIO()
    big.save(buffer, "PNG", compress_level=1)
    with concurrent.futures.ThreadPoolExecutor(24) as pool, httpx.Client(base_url=server.url, timeout=120) as http:

        def edit(_: int) -> int:
            files = {"image": buffer.getvalue(), "mask": buffer.getvalue()}
            answer = http.post("/v1/images/edits", files=files, data={"prompt": "a cat", "steps": "1"})
            assert answer.status_code != 429 or float(answer.headers["retry-after"]) >= 1
            return answer.status_code

        edits = [pool.submit(edit, i) for i in range(24)]
        time.sleep(0.3)
        for seed in range(5):
            assert http.post("/v1/images/generations", json={"prompt": "a cat", "seed": seed}).status_code == 200
        assert not all(one.done() for one in edits), "the others were answered after the edits"
        assert {one.result() for one in edits} == {200, 429}


def test_allowed_pages_read_answers_and_refusals(start_server, tiny_artifact, tmp_path) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    options = ("--allow-origin", "https://example.org", "--api-key-file", tmp_path / "keys", "--backend", "onnxruntime")
    server = start_server("--model", tiny_artifact, *options)
    origin, key = {"origin": "https://example.org"}, {"authorization": "Bearer 0123456789abcdef"}
    with httpx.Client(base_url=server.url, timeout=30) as http:
        job = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,x-stainless-os",
        }
        leave = http.options("/v1/images/generations", headers=origin | job)
        drawn = http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1}, headers=origin | key)
        refused = http.post("/v1/images/generations", json={"prompt": "a cat"}, headers=origin)
        assert (leave.status_code, drawn.status_code, refused.status_code) == (200, 200, 401)
        for answer in (leave, drawn, refused):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert "retry-after" in drawn.headers["access-control-expose-headers"]
        other = http.options("/v1/images/generations", headers=job | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_an_unexpected_error_is_a_500_with_everything_an_answer_has(tiny_artifact, caplog) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        app = create_app(engine, ServerSettings(allow_origin=("https://example.org",)))

        @app.get("/fails")
        async def fails() -> None:
            raise RuntimeError("nobody thought of it")

        with TestClient(app) as http:
            answer = http.get("/fails", headers={"origin": "https://example.org", "x-request-id": "0123-abcd"})
            counts = http.get("/metrics").text
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    assert "nobody" not in answer.text and "nobody thought of it" in caplog.text
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert answer.headers["x-request-id"] == "0123-abcd" and answer.headers["x-content-type-options"] == "nosniff"
    assert 'http_requests_total{handler="/fails",method="GET",status="500"} 1.0' in counts


def test_a_backend_that_recovers_is_ready_again(tiny_artifact, monkeypatch) -> None:
    """A load balancer sends nothing to a server that is not ready, so nothing but a try of its own can tell."""
    monkeypatch.setattr("imagine_flash.engine.server.model.PROBE_EVERY", 0.05)
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine, TestClient(create_app(engine)) as http:
        inner = engine.backend.denoise
        monkeypatch.setattr(engine.backend, "denoise", lambda *given: inner(*given) * np.nan)
        for seed in range(3):
            assert http.get("/readyz").status_code == 200
            assert http.post("/v1/images/generations", json={"prompt": "a cat", "seed": seed}).status_code == 503
        for _ in range(5):
            assert http.get("/readyz").status_code == 503
            time.sleep(0.1)
        monkeypatch.setattr(engine.backend, "denoise", inner)
        limit = time.monotonic() + 20
        while http.get("/readyz").status_code != 200:
            assert time.monotonic() < limit
            time.sleep(0.02)


@pytest.mark.slow
def test_headers_end_soon_and_are_not_large(server) -> None:
    def ends(sent: bytes) -> bytes:
        """What is answered until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            answer = b""
            with suppress(ConnectionError):
                connection.sendall(sent)
                while more := connection.recv(2000):
                    answer += more
            return answer

    started = time.monotonic()
    assert ends(b"GET /healthz HTTP/1.1\r\nx: 1\r\n") == b""
    assert 5 < time.monotonic() - started < 25
    assert ends(b"GET /healthz HTTP/1.1\r\n" + 4000 * (b"x: " + 60 * b"y" + b"\r\n")).startswith(b"HTTP/1.1 431 ")
    large = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: " + 30_000 * b"y" + b"\r\n\r\n"
    assert ends(large).startswith(b"HTTP/1.1 200 ")
