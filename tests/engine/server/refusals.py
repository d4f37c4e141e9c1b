"""What a server does with one malformed request or frame: it refuses it, or the test fails.

An answer of 200 is the server's fault, as is 5xx, or silence where an answer is due.
"""

import json
import socket
import struct
from typing import BinaryIO

from imagine_flash.tests.engine.server.malformed import Malformed, handshake

SILENCE = 20.0  # seconds without the answer that is due
HUNG_UP = "hung up"  # the client did, in the middle of something, or the server before it had read all of too much


def outcome(port: int, sent: Malformed) -> str:
    """What the server does: "400" and the like, "closed 1002" and the like, "error message" or HUNG_UP.

    Anything that is neither a refusal nor allowed silence fails the test.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), SILENCE) as connection, connection.makefile("rb") as reader:
            found = (_of_frames if sent.stream else _of_request)(connection, reader, sent)
    except ConnectionError:  # it closed while bytes that it does not want were on their way
        found = HUNG_UP
    except TimeoutError:
        found = f"no answer in {SILENCE:g} s"
    refused = found == "error message" or found.startswith("closed 1") or (len(found) == 3 and found[0] == "4")
    allowed = found == HUNG_UP and not sent.answer_due
    assert refused or allowed, f"{sent.what} was answered with {found!r}; the bytes begin with {sent.data[:300]!r}"
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
