"""Two replicas on Ray Serve, in processes of their own: what a replica that dies, and an end under load, do to those who asked."""

import concurrent.futures
import io
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Event

import httpx
import psutil
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

pytestmark = [pytest.mark.slow, pytest.mark.alone]
if sys.platform == "win32":
    pytest.skip("Ray's own support of Windows is experimental", allow_module_level=True)

CLIENTS = 8


@pytest.fixture(scope="module")
def cluster(start_server, tiny_artifact: Path):
    server = start_server("--model", tiny_artifact, "--ray", "--replicas", "2", seconds=240)
    wait_for(lambda: f"{server.url}\n" in server.log.read_text())  # both draw, not only the first
    return server


def processes(server, name: str) -> list[psutil.Process]:
    """Of Ray, under this server; those that just ended are left out."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_for(what: Callable[[], object], seconds: float = 60, say: Callable[[], str] = str) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, f"not within {seconds} s: {say()}"
        time.sleep(0.2)


def draw_until(
    server, over: Callable[[], bool], number: int, answered: Counter[int], closing: Event | None = None
) -> Counter[object]:
    """What a client is answered that asks for one picture after the other; every picture is of the seed it asked for. A
    connection may break only for a request that was sent after `closing` was set. answered: counts the answers by client."""
    got: Counter[object] = Counter()
    with httpx.Client(base_url=server.url, timeout=60) as http:
        while not over():
            seed, late = 10_000 * number + got.total(), closing is not None and closing.is_set()
            try:
                answer = http.post("/v1/images/generations", json={"prompt": "a cat", "seed": seed})
            except httpx.TransportError:
                assert late
                return got
            got[answer.status_code] += 1
            answered[number] += 1
            if answer.status_code == 200:
                assert answer.json()["data"][0]["seed"] == seed
            else:
                assert answer.json()["error"]["type"] == "server_error" and int(answer.headers["retry-after"]) >= 1
                time.sleep(0.1)
    return got


def stream(server) -> AbstractContextManager[ClientConnection]:
    return connect(server.url.replace("http", "ws") + "/v1/stream")


def draws(socket: ClientConnection, seq: int) -> bool:
    """Whether it draws; no where it was closed, which must be by "service restart"."""
    try:
        socket.send(json.dumps({"seq": seq, "prompt": "a cat"}))
        while not isinstance(said := socket.recv(60), bytes):
            assert json.loads(said)["type"] == "ready"
        return True
    except ConnectionClosed as closed:
        assert closed.rcvd is not None and closed.rcvd.code == 1012, closed
        return False


def test_a_replica_that_dies_takes_no_request_with_it(cluster) -> None:
    before = processes(cluster, "ray::ServeReplica")
    assert len(before) == 2
    stop, answered = time.monotonic() + 12, Counter[int]()

    def over(client: int) -> bool:
        """After 12 seconds, or on a slow machine once each client has been answered often enough."""
        return time.monotonic() > stop and answered[client] >= 5

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool, ExitStack() as opened:
        sockets = [opened.enter_context(stream(cluster)) for _ in range(6)]  # spread over both, and bound to one each
        assert all(draws(socket, 1) for socket in sockets)
        clients = [pool.submit(draw_until, cluster, partial(over, n), n, answered) for n in range(CLIENTS)]
        wait_for(lambda: len(answered) == CLIENTS)
        before[0].kill()
        wait_for(lambda: any(socket.close_code for socket in sockets))
        left = [socket for socket in sockets if draws(socket, 2)]
        assert 0 < len(left) < len(sockets)  # those of the other replica never noticed
        found = sum((client.result() for client in clients), Counter())
    assert set(found) <= {200, 503} and found[200] > 20, found
    wait_for(lambda: len(processes(cluster, "ray::ServeReplica")) == 2 and before[0] not in processes(cluster, "ray::"))
    with stream(cluster) as again:
        assert draws(again, 1)


def test_limits_errors_and_the_page_are_as_without_ray(cluster) -> None:
    with httpx.Client(base_url=cluster.url, timeout=60) as http:
        wrong = http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 99})
        assert wrong.status_code == 400 and wrong.json()["error"]["type"] == "invalid_request_error"
        large = http.post("/v1/images/generations", content=b" " * 70_000, headers={"content-type": "application/json"})
        assert large.status_code == 413 and large.json()["error"]["code"] == "too_large"
        other = http.post("/v1/images/generations", json={"prompt": "a cat"}, headers={"origin": "https://example.org"})
        assert other.status_code == 403 and http.get("/nowhere").json()["error"]["code"] == "not_found"
        picture = io.BytesIO()
        Image.effect_noise((1500, 1500), 100).save(picture, "PNG")  # 2 MB
        files, job = {"image": picture.getvalue()}, {"prompt": "a cat", "steps": "1", "seed": "3"}
        edited = http.post("/v1/images/edits", files=files, data=job)
        assert edited.status_code == 200 and edited.json()["data"][0]["seed"] == 3
        page = http.get("/", headers={"x-request-id": "0123-abcd"})
        assert "Imagine Flash" in page.text and set(page.headers.get_list("x-request-id")) == {"0123-abcd"}
        assert http.get("/-/routes").status_code == 200
    with stream(cluster) as socket:
        socket.recv(60)
        socket.send(" " * 70_000)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_nothing_listens_to_other_machines(cluster) -> None:
    """gcs_server, raylet and the rest listened at every address. Left is Ray's port between replicas, which wants the token."""

    def listening() -> list[tuple[str, int, bool]]:
        """The name, port and whether others reach it, of every listening process."""
        found = []
        for process in [psutil.Process(cluster.process.pid), *processes(cluster, "")]:
            with suppress(psutil.NoSuchProcess):
                at = [one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
                name = " ".join(process.cmdline())
                found += [
                    (name, a.port, not ipaddress.ip_address(a.ip.removeprefix("::ffff:")).is_loopback) for a in at
                ]
        return found

    def open_to_others() -> list[tuple[str, int]]:
        return [(name, port) for name, port, others in listening() if others]

    wait_for(lambda: len(open_to_others()) >= 2)  # a replica that was killed before may still be starting
    assert len(listening()) > 10 and any(port == cluster.port for _, port, _ in listening())
    elsewhere = open_to_others()
    assert len(elsewhere) == 2 and all(name.startswith("ray::ServeReplica") for name, _ in elsewhere), elsewhere
    grpc = pytest.importorskip("grpc")
    for _, port in elsewhere:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as stranger, pytest.raises(grpc.RpcError) as refused:
            stranger.unary_unary("/ray.serve.ASGIService/HandleRequestWithRejection")(b"", timeout=60)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, refused.value


def test_clients_do_not_say_where_they_are(cluster) -> None:
    headers = {"x-forwarded-for": "192.0.2.66", "x-request-id": "whose-address"}
    assert httpx.get(f"{cluster.url}/v1/models", headers=headers).status_code == 200
    wait_for(lambda: "whose-address" in cluster.log.read_text())
    assert "192.0.2.66" not in cluster.log.read_text()


def test_metrics_of_all_replicas_reach_prometheus_through_ray(cluster) -> None:
    (raylet,) = processes(cluster, "--session_dir=")
    (session,) = {part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--session_dir=")}
    (port,) = {file.read_text().strip() for file in Path(session).glob("metrics_export_port_*")}

    def replicas() -> set[str]:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        return set(re.findall(r'ray_imagine_flash_ready\{.*replica="(\w+)".*\} 1', text))

    wait_for(lambda: len(replicas()) >= 2)


def test_sigterm_under_load_draws_what_was_accepted(cluster) -> None:
    closing, answered = Event(), Counter[int]()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        over = cluster.process.poll
        draw = partial(draw_until, cluster, lambda: over() is not None)
        clients = [pool.submit(draw, n, answered, closing) for n in range(CLIENTS)]
        wait_for(lambda: len(answered) == CLIENTS)
        closing.set()
        cluster.process.send_signal(signal.SIGTERM)
        assert cluster.process.wait(60) == 0
        found = sum((client.result() for client in clients), Counter())
    assert set(found) <= {200, 503} and found[200] > 5, found


@pytest.mark.parametrize(("number", "during"), [(signal.SIGTERM, "gcs_server"), (signal.SIGINT, "ray::ServeReplica")])
def test_a_signal_ends_the_start(start_server, number: int, during: str) -> None:
    """It was only noted until the application ran, which may be never in a cluster whose processors are taken."""
    server = start_server("--ray", "--replicas", "1", seconds=0)

    def has_begun() -> bool:
        assert server.process.poll() is None, server.log.read_text()
        return bool(processes(server, during))

    wait_for(has_begun, 240, say=server.log.read_text)  # as long as the cluster above may take
    started = processes(server, "")
    server.process.send_signal(number)
    assert server.process.wait(20) == 130
    assert "Traceback" not in server.log.read_text() and server.url not in server.log.read_text()
    wait_for(lambda: not any(process.is_running() for process in started), 10)


@pytest.mark.weekly  # Ray's own command gives its proxies a minute, which a busy machine may not keep
def test_a_serve_config_runs_it(tmp_path: Path) -> None:
    """deploy/ray-serve.yaml as a stranger would try it, at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Path(__file__).parents[3] / "deploy" / "ray-serve.yaml"
    text = config.read_text()
    (tmp_path / "serve.yaml").write_text(text.replace("port: 8000", f"port: {port}"))
    said = dict(re.findall(r"export (\w+)=(\S+)", text))
    assert len(said) == 2
    command = [Path(sys.executable).with_name("serve"), "run", tmp_path / "serve.yaml"]
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, **said, "RAY_ADDRESS": "local"}  # not in a Ray that happens to run
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, 200)
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a cat", "seed": 1}, timeout=60)
        assert answer.status_code == 200 and answer.json()["data"][0]["seed"] == 1
    finally:
        process.terminate()
        process.wait(60)
