"""Who does not read what was asked for keeps neither memory nor the server's end waiting."""

import gc
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import ConnectionClosed
from websockets.sync import client

from imagine_flash.cli.listening import configuration, listen
from imagine_flash.engine import Engine
from imagine_flash.engine.server import ServerSettings, connections, create_app
from imagine_flash.tests.engine.server.malformed import frame, handshake

LARGE = {"prompt": "a cat", "steps": 1, "size": "2048x2048", "n": 4}  # some 2 MB of answer


@pytest.fixture
def serve(tiny_artifact: Path) -> Iterator[Callable[..., tuple[uvicorn.Server, int]]]:
    """Starts a server in a thread of this process; they end with the test."""
    started: list[tuple[uvicorn.Server, threading.Thread]] = []
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:

        def start(**values: Any) -> tuple[uvicorn.Server, int]:
            settings = ServerSettings(**values)
            server, listening = (
                uvicorn.Server(configuration(create_app(engine, settings), settings)),
                listen("::1", 0),
            )
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            started.append((server, thread))
            thread.start()
            wait_until(lambda: server.started)
            return server, listening.getsockname()[1]

        yield start
        for server, thread in started:
            server.should_exit = True
            thread.join(30)


def wait_until(what: Callable[[], object], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def connect(port: int, sent: bytes) -> socket.socket:
    """A client that reads nothing, and whose system keeps little for it."""
    connection = socket.socket(socket.AF_INET6)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("::1", port))
    connection.sendall(sent)
    return connection


def post(port: int, body: dict[str, object] = LARGE) -> socket.socket:
    data = json.dumps(body).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return connect(port, f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)


def flood_with_pings(port: int) -> socket.socket:
    """A WebSocket that sends 50 MB of them, unless it is stopped, and reads nothing."""
    stream = connect(port, handshake())
    stream.settimeout(10)
    greeting = b""
    while b'"ready"' not in greeting:
        greeting += stream.recv(2000)
    stream.settimeout(0.5)
    pings = frame(b"a" * 125, first=0x89) * 4000
    with suppress(TimeoutError):
        for _ in range(100):
            stream.sendall(pings)
    return stream


def unread(server: uvicorn.Server) -> int:
    return len(server.config.http_protocol_class.unread)  # type: ignore[attr-defined]


def test_an_answer_that_nobody_reads_is_let_go(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was kept for as long as the connection: 60 MB each, of as many connections as may be."""
    monkeypatch.setattr(connections, "LOOK_WHETHER_READ_EVERY", 0.3)
    server, port = serve()
    with post(port):
        wait_until(lambda: unread(server))
        wait_until(lambda: not unread(server) and not server.server_state.connections)


def test_where_too_much_waits_to_be_read_the_longest_goes(serve) -> None:
    server, port = serve(max_memory=2**20)
    first = post(port, {**LARGE, "size": "4096x2048"})
    wait_until(lambda: not server.server_state.connections and server.server_state.total_requests)
    first.close()
    with post(port, {"prompt": "a cat", "steps": 1}) as small:
        assert small.recv(15) == b"HTTP/1.1 200 OK"


def test_pings_of_who_does_not_read_are_not_answered_for_ever(serve) -> None:
    """Each was answered: the server kept all answers."""
    server, port = serve()
    with flood_with_pings(port):
        (connection,) = server.server_state.connections
        assert connection.transport.get_write_buffer_size() < 2**20  # type: ignore[union-attr]


def test_small_frames_are_taken_in_pieces(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred thousand at once kept everybody else waiting for three seconds."""
    taken, inner = [], WebSocketsSansIOProtocol.data_received
    monkeypatch.setattr(
        WebSocketsSansIOProtocol, "data_received", lambda self, data: (taken.append(len(data)), inner(self, data))
    )
    _, port = serve()
    with client.connect(f"ws://[::1]:{port}/v1/stream", max_size=None) as stream:
        assert "ready" in str(stream.recv(20))
        stream.socket.sendall(50 * frame(b'{"type":"ping"}') + 20_000 * frame(b"", first=0x89))
        assert [stream.recv(20) for _ in range(50)] == 50 * ['{"type":"pong"}']
        stream.send(bytes(200_000))
        stream.send('{"seq":1,"prompt":"a cat","strength":0.5}')
        assert "image is no PNG" in str(stream.recv(20))
        stream.send('{"seq":2,"prompt":"a cat"}')
        assert isinstance(stream.recv(20), bytes)
    assert sum(taken) > 320_000 and max(taken) <= connections.PIECE


def test_who_does_not_answer_a_close_keeps_nobody_out(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each held a connection for 10 seconds, and a thousand of them all there may be: others had a bare 503."""
    monkeypatch.setattr(connections, "GOODBYE_SECONDS", 60)
    _, port = serve(max_streams=1, max_connections=8)
    with ExitStack() as opened:
        for _ in range(20):
            stream = opened.enter_context(connect(port, handshake()))
            with suppress(ConnectionError):  # its place was needed
                assert stream.recv(12) in (b"HTTP/1.1 101", b"")
        healthy = opened.enter_context(connect(port, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"))
        assert healthy.recv(12) == b"HTTP/1.1 200"


def test_an_answer_to_a_close_is_not_waited_for_long(serve) -> None:
    server, port = serve(max_streams=1)
    with connect(port, handshake()), connect(port, handshake()):
        wait_until(lambda: len(server.server_state.connections) == 2)
        wait_until(lambda: len(server.server_state.connections) == 1, seconds=8)  # uvicorn waits for 10


def test_nobody_holds_all_streams(serve) -> None:
    """One client could have every one of them, and others were told to try again for as long as it stayed."""
    keys = {name: f"0123456789abcdef-{name}" for name in ("greedy", "modest")}
    _, port = serve(max_streams=4, api_keys=[{"key": key, "name": name} for name, key in keys.items()])
    with ExitStack() as opened:

        def open_one(name: str) -> client.ClientConnection:
            headers = {"Authorization": f"Bearer {keys[name]}"}
            return opened.enter_context(client.connect(f"ws://[::1]:{port}/v1/stream", additional_headers=headers))

        def is_full(stream: client.ClientConnection) -> bool:
            """Whether it was told so; else it is told that it may begin."""
            try:
                return "ready" not in str(stream.recv(20))
            except ConnectionClosed as closed:
                assert closed.rcvd is not None and closed.rcvd.code == 1013
                assert closed.rcvd.reason == "4 streams are open, at most 4 may be"  # which the page knows
                return True

        greedy = [open_one("greedy") for _ in range(4)]
        assert not any(map(is_full, greedy)) and is_full(open_one("greedy"))
        assert [is_full(open_one("modest")) for _ in range(3)] == [False, False, True]
        assert all(map(is_full, greedy[2:])), "the newest ones go"
        for stream in greedy[:2]:
            stream.send('{"type":"ping"}')
            assert "pong" in str(stream.recv(20))


@pytest.mark.parametrize("kind", ["half a body", "unread", "unread stream"])
def test_at_its_end_the_server_waits_for_nobody_slow(serve, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for 30 seconds."""
    monkeypatch.setattr(connections, "CLOSE_SECONDS", 0.3)
    server, port = serve()
    if kind == "half a body":
        slow = connect(port, b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        wait_until(lambda: server.server_state.tasks)
    elif kind == "unread":
        slow = post(port)
        wait_until(lambda: unread(server))
    else:
        slow = flood_with_pings(port)
    with slow:
        started = time.monotonic()
        server.should_exit = True
        wait_until(lambda: not server.server_state.connections)
        assert time.monotonic() - started < 10


def test_at_its_end_the_server_reads_the_rest_of_a_request(serve) -> None:
    server, port = serve()
    data = json.dumps({"prompt": "a cat", "steps": 1}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    with connect(port, head.encode() + b"\r\n" + data[:5]) as slow:
        wait_until(lambda: server.server_state.tasks)
        server.should_exit = True
        time.sleep(0.5)
        slow.sendall(data[5:])
        assert slow.recv(15) == b"HTTP/1.1 200 OK"


def test_of_a_connection_that_is_reset_nothing_is_kept(serve: Callable[..., tuple[uvicorn.Server, int]]) -> None:
    """Who closes with a part of the answer unread resets the connection; uvicorn would keep it for its keep-alive time."""
    server, port = serve()
    for _ in range(8):
        with connect(port, b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n") as connection:
            assert connection.recv(8) == b"HTTP/1.1"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: not server.server_state.connections)

    def kept() -> int:
        gc.collect()
        return sum(issubclass(type(one), connections.Connection) for one in gc.get_objects())

    wait_until(lambda: kept() == 0)
