"""Keys, signals, and what a server says when it cannot start."""

import concurrent.futures
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

KEY = "0123456789abcdef-key"


def test_keys(start_server, tiny_artifact: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\n{KEY}\n")
    server = start_server("--model", tiny_artifact, "--api-key-file", keys)
    url = server.url
    body = {"prompt": "a cat", "steps": 1}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer x"}):
        answer = httpx.post(f"{url}/v1/images/generations", json=body, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    good = {"authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{url}/v1/images/generations", json=body, headers=good, timeout=30).status_code == 200
    assert httpx.get(f"{url}/v1/models").status_code == 401 and httpx.get(f"{url}/healthz").status_code == 200
    stream = url.replace("http", "ws") + "/v1/stream"
    with pytest.raises(InvalidStatus) as refused:
        connect(stream)
    assert refused.value.response.status_code == 401
    connect(stream, additional_headers=good).close()
    with connect(stream, subprotocols=["imagine-flash", f"imagine-flash.key.{KEY}"]) as browser:  # type: ignore[list-item]
        assert browser.subprotocol == "imagine-flash"
    server.stop()
    log = server.log.read_text()
    assert KEY not in log and '"status": 401' in log and '"request_id"' in log


def test_sigterm_draws_what_was_accepted(start_server, tiny_artifact: Path) -> None:
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime")
    url = server.url
    with concurrent.futures.ThreadPoolExecutor(12) as pool, httpx.Client(timeout=60) as http:

        def draw(seed: int) -> int:
            body = {"prompt": "a cat", "seed": seed, "n": 4}
            return http.post(f"{url}/v1/images/generations", json=body).status_code

        answers = [pool.submit(draw, seed) for seed in range(12)]
        metrics, limit = "", time.monotonic() + 30
        while "imagine_flash_waiting_pictures 0.0" in metrics or "waiting_pictures" not in metrics:
            metrics = httpx.get(f"{url}/metrics").text
            assert time.monotonic() < limit
        server.process.send_signal(signal.SIGTERM)
        found = []
        for answer in answers:
            try:
                found.append(answer.result())
            except httpx.TransportError:  # never accepted: the door was closed
                found.append(0)
    assert server.process.wait(60) is not None
    assert set(found) <= {200, 0, 503} and 200 in found, found


def test_sigkill_and_restart(start_server, tiny_artifact: Path) -> None:
    server = start_server("--model", tiny_artifact)
    server.kill()
    server.start()
    assert httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a cat"}, timeout=30).status_code == 200


def run(*options: str | Path) -> str:
    code = "from imagine_flash.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "serve", *map(str, options)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    return done.stderr.strip().splitlines()[-1]


def test_what_cannot_be_served(tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "short").write_text("secret\n")
    for options, says in (
        (["--model", tmp_path / "none"], "none does not exist"),
        (["--host", "example.org"], "host must be an address"),
        (["--port", "70000"], "70000"),
        (["--timeout", "-1"], "timeout"),
        (["--max-queue", "0"], "max_queue: Input should be greater than or equal to 1, got 0"),
        (["--backend", "cuda"], "no backend 'cuda'"),
        (["--api-key-file", tmp_path / "none"], "cannot read the keys"),
        (["--api-key-file", tmp_path / "empty"], "holds no key"),
        (["--api-key-file", tmp_path / "short"], "key 1 of"),
    ):
        line = run("--model", tiny_artifact, *([] if "--port" in options else ["--port", "0"]), *options)
        assert line.startswith("error: ") and says in line, line
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}" in run("--model", tiny_artifact, "--port", str(port))
