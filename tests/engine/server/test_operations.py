"""Keys, signals, and what a server says when it cannot start."""

import concurrent.futures
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from imagine_flash.core.errors import RequestError
from imagine_flash.engine import Engine
from imagine_flash.engine.server import create_app
from imagine_flash.engine.server.settings import ApiKey, ServerSettings, read_keys, read_settings
from imagine_flash.folders.files import sha256_file
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.tests.commands import fails

KEY = "0123456789abcdef-key"


def test_keys(start_server, tiny_artifact: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\n{KEY}\n")
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", "--api-key-file", keys)
    url = server.url
    body = {"prompt": "a cat", "steps": 1}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer x"}):
        answer = httpx.post(f"{url}/v1/images/generations", json=body, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    good = {"authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{url}/v1/images/generations", json=body, headers=good, timeout=30).status_code == 200
    assert httpx.get(f"{url}/sdapi/v1/options", auth=("anybody", KEY)).status_code == 200
    assert httpx.get(f"{url}/sdapi/v1/options", auth=("anybody", "wrong")).status_code == 401
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
    """Only a request that was sent after the end was announced may find the door closed. The signal comes when each client has sent
    one, so that the server has every other one in its hands by then."""
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime")
    announced, answered, late_ones = threading.Event(), [], set()  # when; clients

    def draw_until_the_end(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while True:
                if late := announced.is_set():
                    late_ones.add(number)
                try:
                    answer = http.post("/v1/images/generations", json={"prompt": "a cat", "seed": number, "n": 4})
                except httpx.TransportError:
                    assert late
                    return
                assert answer.status_code == 200 and len(answer.json()["data"]) == 4, answer.text
                answered.append(time.monotonic())

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(draw_until_the_end, number) for number in range(12)]
        limit = time.monotonic() + 30
        while len(answered) < 24:
            assert time.monotonic() < limit
            time.sleep(0.01)
        announced.set()
        while len(late_ones) < len(clients):
            assert time.monotonic() < limit
            time.sleep(0.01)
        ended = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.result()
    assert server.process.wait(60) == -signal.SIGTERM  # it ended by itself, and says by what
    assert max(answered) > ended  # under load: some were being drawn


def test_the_url_of_a_server_for_everybody_leads_to_it(start_server, tiny_artifact: Path) -> None:
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", "--host", "0.0.0.0")
    log = server.log.read_text()
    assert f"{server.url}\n" in log and "everybody who reaches 0.0.0.0 may draw" in log


def test_clients_do_not_say_where_they_are(start_server, tiny_artifact: Path) -> None:
    """x-forwarded-for of anybody on this machine was logged as the client."""
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime")
    httpx.get(f"{server.url}/v1/models", headers={"x-forwarded-for": "192.0.2.66"})
    server.stop()
    log = server.log.read_text()
    assert '"path": "/v1/models"' in log and "192.0.2.66" not in log


def run(*options: str | Path, url: bool = False, before: str = "", **environment: str) -> str:
    """The one line on standard error of a server that does not start; url: which listens before it finds out; before:
    code of the process that starts it."""
    code = before + "from imagine_flash.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert done.returncode == 2 and len(done.stdout.splitlines()) == url, done
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: "), line
    return line


ORIGIN = "--allow-origin: must be http://HOST or https://HOST, :PORT after it where it has one, and no path, got"


def test_what_cannot_be_served(tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "base64").write_text("q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=\n")
    for options, says in (
        (["--model", tmp_path / "none"], "none does not exist"),
        (["--host", "example.org"], "--host must be an address"),
        (["--host", "0.0.0.0", "--precision", "fp9"], "no precision 'fp9'"),
        (["--port", "70000"], "70000"),
        (["--timeout", "-1"], "--timeout: Input should be greater than 0, got -1"),
        (["--max-queue", "0"], "--max-queue: Input should be greater than or equal to 1, got 0"),
        (
            ["--threads", "99999"],
            f"--threads: must be 1 to {os.cpu_count()}, the processors of this machine, got 99999",
        ),
        (["--backend", "cuda"], "no backend 'cuda'"),
        (["--api-key-file", tmp_path / "none"], "cannot read the keys"),
        (["--api-key-file", tmp_path / "empty"], "holds no key"),
        (["--api-key-file", tmp_path / "short"], "key 1 of"),
        (["--api-key-file", tmp_path / "base64"], "make one with: openssl rand -hex 32"),
        (["--trusted-proxy", "bogus"], "--trusted-proxy: must be an address such as 127.0.0.1, a network"),
        (["--allow-origin", "example.org"], f"{ORIGIN} 'example.org'"),
        (["--allow-origin", "https://example.org", "--allow-origin", "*"], f"{ORIGIN} '*'"),
    ):
        line = fails("serve", "--model", tiny_artifact, *([] if "--port" in options else ["--port", "0"]), *options)
        assert says in line, line
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails("serve", "--model", tiny_artifact, "--port", str(port))
        assert f"cannot listen at 127.0.0.1:{port} (" in line and line.count("(") == 1, line


def test_a_wrong_device_or_batch_is_said_before_the_url(tiny_artifact: Path) -> None:
    wrong = ("--model", tiny_artifact, "--backend", "onnxruntime", "--port", "0")
    assert "--device must be auto" in fails("serve", *wrong, "--device", "tpu")
    assert "--max-batch must be" in fails("serve", *wrong, "--max-batch", "9999")
    assert "for fp16 run" in fails("serve", *wrong, "--precision", "fp16")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a GPU is here")
def test_a_device_that_is_not_here_is_said_before_the_url(tiny_artifact: Path, tiny_student: Path) -> None:
    """It was found by loading, after the URL."""
    for model, backend, says in (
        (tiny_artifact, "onnxruntime", "no CUDAExecutionProvider"),
        (tiny_artifact, "tensorrt", "NVIDIA" if importlib.util.find_spec("tensorrt") else "needs tensorrt"),
        (tiny_student, "torch", "finds no CUDA"),
    ):
        assert says in fails("serve", "--model", model, "--backend", backend, "--port", "0", "--device", "cuda")


def test_what_only_loading_finds_is_said_once(tiny_artifact: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_artifact, tmp_path / "damaged")
    manifest = read_artifact_manifest(damaged)
    (damaged / "decoder.onnx").write_bytes(b"not a graph")
    files = {**manifest.files, "decoder.onnx": sha256_file(damaged / "decoder.onnx")}
    write_manifest(damaged, manifest.model_copy(update={"files": files}))
    assert "cannot run decoder" in run("--model", damaged, "--backend", "onnxruntime", "--port", "0", url=True)


def test_a_server_without_files_says_so(start_server, tiny_artifact: Path) -> None:
    """New connections were closed without an answer, and nothing said why; with few from the start, all were."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs Linux")
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime")
    before = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    limit = time.monotonic() + 20
    while "new connections are not accepted: Too many open files" not in server.log.read_text():
        assert time.monotonic() < limit
        time.sleep(0.1)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, before)
    assert httpx.get(f"{server.url}/healthz").text == "ok"
    server.stop()
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)); "
    assert "may open 60 files, a server needs 72" in run("--port", "0", "--model", tiny_artifact, before=code)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_what_ray_cannot_serve(tiny_artifact: Path) -> None:
    """Before a Ray is started: nobody waits for its warnings."""
    for options, address, says in (
        ([], "127.0.0.1:1", "no Ray answers at RAY_ADDRESS=127.0.0.1:1 ("),
        ([], "ray://127.0.0.1:1", "RAY_ADDRESS must be HOST:PORT"),
        ([], "nonsense", "RAY_ADDRESS must be HOST:PORT"),
        (["--backend", "cuda"], "", "no backend 'cuda'"),
        (["--allow-origin", "*"], "", f"{ORIGIN} '*'"),
        (["--threads", "99999"], "", "--threads: must be 1 to"),
    ):
        line = run("--ray", "--model", tiny_artifact, "--port", "0", *options, RAY_ADDRESS=address)
        assert says in line, line


def test_a_proxy_is_an_address_or_a_network() -> None:
    """With bits of a host, a network was compared as a name, which nobody has."""
    given = ("127.0.0.1", "::1", "10.1.2.3/8", "192.168.0.0/16")
    assert ServerSettings(trusted_proxy=given).trusted_proxy == ("127.0.0.1", "::1", "10.0.0.0/8", "192.168.0.0/16")
    assert ServerSettings(trusted_proxy="*").trusted_proxy == ("*",)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"trusted_proxy: must be an address .*, got '10\.0\.0\.0/99'"):
        ServerSettings(trusted_proxy=("10.0.0.0/99",))


def test_a_settings_file_has_the_options_names(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"max-queue: 7\ntimeout: 5\nallow_origin: https://a.example\napi-keys: [{{key: {KEY}, name: ann, weight: 2}}]\n"
    )
    settings = read_settings(file, {"timeout": 9.0})
    assert (settings.max_queue, settings.timeout, settings.allow_origin) == (7, 9.0, ("https://a.example",))
    assert settings.api_keys == (ApiKey(key=KEY, name="ann", weight=2.0),)
    for text, says in (
        ("max-quue: 7", "there is no 'max_quue'; did you mean 'max_queue'?"),
        ("max-queue: 0", "max_queue: Input should be greater than or equal to 1, got 0"),
        ("- 1", "must hold names and values"),
        ("a: [", "is no YAML"),
        ("quota: many", "quota: must be NUMBER/minute"),
        ("quota: 5/hour; 0/minute", "1 or more, several with ; between them, got '5/hour; 0/minute'"),
        ("api-keys: [short-secret]", "key: must have 16 or more"),
        ("replicas: 2", "replicas: go with ray"),
        (
            f"api-keys: [{{key: {KEY}, name: ann}}, {{key: {KEY}2, name: ann}}]",
            "api_keys: each needs a name of its own, but two are named 'ann'",
        ),
        ("log-level: loud", "log_level: Input should be 'debug', 'info'"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError) as error:
            read_settings(file, {})
        assert says in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)
        assert "short-secret" not in str(error.value)
    with pytest.raises(RequestError, match="cannot read"):
        read_settings(tmp_path / "none", {})


def test_the_options_defaults_are_the_settings() -> None:
    import typer

    from imagine_flash.cli import app

    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    shown = {one.name: one.default for one in serve.params if one.name not in ("config", "quiet", "help")}
    known = ServerSettings()
    for name, default in shown.items():
        assert (default or None) == (getattr(known, name) or None), name


def test_keys_have_names_quotas_and_metrics(tiny_artifact: Path, tmp_path: Path, start_server) -> None:
    file = tmp_path / "settings.yaml"
    other = "fedcba9876543210"
    file.write_text(f"api-keys:\n- {{key: {KEY}, name: ann, quota: 3/hour}}\n- {{key: {other}}}\nlog-format: text\n")
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", "--config", file)
    with httpx.Client(base_url=server.url, timeout=30) as http:

        def draw(key: str, n: int) -> httpx.Response:
            body = {"prompt": "a cat", "n": n, "steps": 1}
            return http.post("/v1/images/generations", json=body, headers={"authorization": f"Bearer {key}"})

        assert draw(KEY, 2).status_code == 200
        refused = draw(KEY, 2)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "3 per 1 hour" in refused.json()["error"]["message"] and 1 <= int(refused.headers["retry-after"]) <= 7200
        assert draw(KEY, 1).status_code == 200 and draw(other, 5).status_code == 200
        counts = http.get("/metrics").text
    assert 'imagine_flash_key_pictures_total{key="ann"} 3.0' in counts
    assert 'imagine_flash_key_pictures_total{key="key 2"} 5.0' in counts
    server.stop()
    assert "POST /v1/images/generations 429" in server.log.read_text() and KEY not in server.log.read_text()


def test_without_keys_each_address_has_the_quota(tiny_artifact: Path) -> None:
    """Of IPv6 each network of a customer, who has 2^64 addresses. All clients of IPv4 had one quota where a socket takes both
    kinds: their addresses are of one such network there."""
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        app = create_app(engine, ServerSettings(quota="2/hour"))

        def draw(address: str, n: int) -> int:
            http = TestClient(app, client=(address, 50_000))
            return http.post("/v1/images/generations", json={"prompt": "a cat", "n": n, "steps": 1}).status_code

        assert [draw("192.0.2.1", n) for n in (3, 2, 1)] == [400, 200, 429]
        assert draw("192.0.2.2", 2) == 200
        assert [draw(a, 2) for a in ("2001:db8::1", "2001:db8::ffff", "2001:db8:0:1::1")] == [200, 429, 200]
        mapped = ("::ffff:192.0.2.2", "::ffff:192.0.2.3", "::ffff:192.0.2.4", "192.0.2.4")
        assert [draw(address, 2) for address in mapped] == [429, 200, 200, 429]
        with TestClient(app, client=("192.0.2.1", 50_000)).websocket_connect("/v1/stream") as stream:
            assert stream.receive_json()["type"] == "ready"
            stream.send_json({"seq": 1, "prompt": "a cat"})
            assert stream.receive_json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_probes_are_not_in_the_log_and_invalid_requests_are_with_their_address(
    start_server, tiny_artifact: Path, log_format: str
) -> None:
    """A path was logged as it was decoded: with an end of a line in it, as lines of its own."""
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", "--log-format", log_format)
    for path in ("/healthz", "/readyz", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    assert httpx.get(f"{server.url}/a%0a0.0.0.0%20GET%20/forged?key=1").status_code == 404
    with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
        raw.sendall(b"rubbish\r\n\r\n")
        assert b" 400 " in raw.recv(1000)
    server.stop()
    log = server.log.read_text()
    assert "/healthz" not in log and "/metrics" not in log and "invalid request of 127.0.0.1" in log
    assert "Invalid HTTP request" not in log
    (line,) = (line for line in log.splitlines() if "forged" in line)
    assert " GET /a%0A0.0.0.0%20GET%20/forged 404 " in line


def test_origins_are_as_browsers_write_them() -> None:
    for given, known in (
        ("https://Example.org", "https://example.org"),
        ("https://example.org:443", "https://example.org"),
        ("http://example.org:8080", "http://example.org:8080"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ):
        assert ServerSettings(allow_origin=(given,)).allow_origin == (known,)
    for given in (
        "",
        "null",
        "https://example.org/",
        "ftp://a",
        "https://me@a",
        "https://a:0",
        "https://a:70000",
        "//a",
    ):
        with pytest.raises(RequestError, match="allow_origin: must be http://HOST"):
            ServerSettings(allow_origin=(given,))


def test_threads_of_another_machine_are_not_bounded_by_this_one() -> None:
    ServerSettings(threads=99_999).check_model(here=False)
    with pytest.raises(RequestError, match="99999"):
        ServerSettings(threads=99_999).check_model()


def test_a_key_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n", encoding="utf-8-sig")
    assert read_keys(tmp_path / "keys") == (ApiKey(key=KEY),)


def test_no_two_keys_have_one_name(tmp_path: Path) -> None:
    """They shared a quota, a share of the engine and their metrics. Those without a name have one each."""
    (tmp_path / "keys").write_text(f"{KEY} ann\n{KEY}2\n{KEY}3\n")
    settings = ServerSettings(api_key_file=tmp_path / "keys")
    assert [key.name for key in settings.with_keys().api_keys] == ["ann", "", ""]
    both = settings.model_copy(update={"api_keys": (ApiKey(key=f"{KEY}4", name="ann"),)})
    with pytest.raises(RequestError) as refused:
        both.with_keys()
    assert str(refused.value) == "api_keys: each needs a name of its own, but two are named 'ann'"
