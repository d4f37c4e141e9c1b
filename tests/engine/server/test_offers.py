"""Requests that offer to go on in another protocol, which is overlooked unless it is WebSocket."""

import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import pytest
import uvicorn
from websockets.sync import client

from imagine_flash.cli.listening import configuration, listen
from imagine_flash.engine.server import ServerSettings, connections

OFFER = "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAA"  # Java's and curl's
BODY = b'{"prompt": "a cat"}'


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with what it was sent; to a WebSocket, with its first message."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        text = (await receive())["text"]
        return await send({"type": "websocket.send", "text": text})
    body, more = b"", scope["type"] == "http"
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    names = b",".join(name for name, _ in scope["headers"] if name in (b"upgrade", b"x-kept"))
    headers = [(b"content-length", str(len(body)).encode()), (b"x-names", names)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = uvicorn.Server(configuration(echo, ServerSettings()))  # type: ignore[arg-type]
    server.config.lifespan = "off"
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)


CHUNKED = b"5\r\n" + BODY[:5] + b"\r\ne\r\n" + BODY[5:] + b"\r\n0\r\n\r\n"


def post(*lines: str, body: bytes = BODY) -> bytes:
    length = f"content-length: {len(body)}" if body == BODY else "transfer-encoding: chunked"
    return "\r\n".join(("POST / HTTP/1.1", "host: a", "x-kept: 1", *lines, length, "", "")).encode() + body


def read(connection: socket.socket) -> tuple[int, str | None, bytes]:
    """Of an answer: its status, the names of headers that the application has seen, the body."""
    response = HTTPResponse(connection)
    response.begin()
    return response.status, response.headers["x-names"], response.read()


GOOD = 200, "x-kept", BODY


@pytest.mark.parametrize("body", [BODY, CHUNKED], ids=["of a length", "chunked"])
@pytest.mark.parametrize("cut", ["", "\r\n\r\n", "\r\nUpgr", "Upgrade: h", "anywhere"])
def test_another_protocol_is_overlooked(port: int, cut: str, body: bytes) -> None:
    """The body was lost, as if it were in that protocol: curl --http2 and Java's client were refused."""
    sent = post(*OFFER, body=body)
    at = sent.index(cut.encode()) + len(cut) if cut != "anywhere" else 0
    pieces = [sent[:at], sent[at:]] if at else [sent[i : i + 7] for i in range(0, len(sent), 7)]
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.003)
            assert read(connection) == GOOD
        connection.sendall(post())
        assert read(connection) == GOOD


def test_so_is_each_of_many_in_one_segment(port: int) -> None:
    many = 500
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(post() + many * post(*OFFER) + post(*OFFER, "connection: close", body=CHUNKED))
        with connection.makefile("rb") as answers:
            received = answers.read()
    assert received.count(b"HTTP/1.1 200 ") == received.count(BODY) == many + 2


def test_other_offers_are_as_before(port: int) -> None:
    with client.connect(f"ws://127.0.0.1:{port}/") as stream:
        stream.send("hello")
        assert stream.recv(10) == "hello"
    for sent, status in (
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", b"400"),
        (post("connection: upgrade", "upgrade: h2c", "content-length: 1"), b"400"),
        (post("upgrade: h2c"), b"200"),
    ):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(sent)
            assert connection.recv(1000).startswith(b"HTTP/1.1 " + status), sent


def test_headers_with_an_offer_have_the_same_most(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(post(*OFFER, *(100 * ["x: " + 1000 * "y"]))[: connections.MOST_HEADER_BYTES + 2000])
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
