"""What a server does with malformed requests and frames: refuse each, and go on serving.

An answer of 200 is the server's fault, as is 5xx, or silence where an answer is due.
"""

import json
import socket
import struct
from collections import Counter
from typing import BinaryIO

import httpx
import pytest

from imagine_flash.engine.server.schemas import ImageRequest
from imagine_flash.tests.engine.server.malformed import KINDS, Malformed, handshake, malformed

SILENCE = 20.0  # seconds without the answer that is due
HUNG_UP = "hung up"  # the client did, in the middle of something, or the server before it had read all of too much


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_each_is_refused_and_good_requests_are_answered_between(server, count: int) -> None:
    outcomes: Counter[str] = Counter()
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for number, sent in enumerate(malformed(count, seed=0), 1):
            outcomes[outcome(server.port, sent)] += 1
            if number % 100 == 0:
                answer = http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1, "seed": number})
                assert answer.status_code == 200
    assert server.process.poll() is None and "Traceback" not in server.log.read_text()
    assert {"400", "413", "closed 1002", "error message"} < outcomes.keys(), outcomes


def test_the_same_seed_makes_the_same_malformed_requests() -> None:
    assert list(malformed(60, 3)) == list(malformed(60, 3)) != list(malformed(60, 4))


def test_no_json_of_a_malformed_request_could_be_drawn() -> None:
    """9e18 once was a "huge number", and is a seed like any other."""
    for sent in list(malformed(60 * len(KINDS), 5))[:: len(KINDS)]:
        body = sent.data.partition(b"\r\n\r\n")[2]
        try:
            found = ImageRequest.model_validate(json.loads(body))
        except (ValueError, RecursionError):
            continue
        assert sent.what == "impossible value", sent
        assert found.size not in (None, "64x64") or found.steps == 999 or not found.prompt.strip()


def outcome(port: int, sent: Malformed) -> str:
    """What the server does: "400" and the like, "closed 1002" and the like, "error message" or HUNG_UP.

    Fails for anything that is neither a refusal nor allowed silence.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), SILENCE) as connection, connection.makefile("rb") as reader:
            found = (_of_frames if sent.stream else _of_request)(connection, reader, sent)
    except ConnectionError:  # it closed while bytes that it does not want were on their way
        found = HUNG_UP
    except TimeoutError:
        found = f"no answer in {SILENCE:g} s"
    refused = found == "error message" or found.startswith("closed 1") or (len(found) == 3 and found[0] == "4")
    if not (refused or (found == HUNG_UP and not sent.answer_due)):
        pytest.fail(f"{sent.what} was answered with {found!r}; the bytes begin with {sent.data[:300]!r}")
    return found


def _of_request(connection: socket.socket, reader: BinaryIO, sent: Malformed) -> str:
    try:
        connection.sendall(sent.data)
        if not sent.answer_due:
            connection.shutdown(socket.SHUT_WR)
    except ConnectionError:  # an answer may have come before
        pass
    line = reader.readline(1000)
    return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else repr(line) if line else HUNG_UP


def _of_frames(connection: socket.socket, reader: BinaryIO, sent: Malformed) -> str:
    compressed = "Sec-WebSocket-Extensions: permessage-deflate\r\n" if "deflate" in sent.what else ""
    connection.sendall(handshake(extra=compressed))
    if b" 101 " not in (line := reader.readline(1000)):
        return f"a handshake with {line!r}"
    while reader.readline(1000).strip():
        pass
    _next_frame(reader)  # "ready"
    connection.sendall(sent.data)
    if not sent.answer_due:
        connection.shutdown(socket.SHUT_WR)
    opcode, payload = _next_frame(reader)
    if opcode == 8:
        return f"closed {struct.unpack('>H', payload[:2])[0] if payload else 1005}"
    if opcode == 1 and json.loads(payload)["type"] == "error":
        return "error message"
    return HUNG_UP if opcode < 0 else f"a frame {payload[:100]!r}"


def _next_frame(reader: BinaryIO) -> tuple[int, bytes]:
    """Opcode and payload of the server's next frame that is no ping; -1 where it has closed."""
    while len(head := reader.read(2)) == 2:
        length = head[1]
        if length > 125:
            length = int.from_bytes(reader.read(2 if length == 126 else 8), "big")
        payload = reader.read(length)
        if head[0] & 15 not in (9, 10):
            return head[0] & 15, payload
    return -1, b""
