"""uvicorn's HTTP connections with what it has no settings for: an end to headers, how many there are, half-closed ones, and
those that do not read their answers."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import time
from contextlib import suppress
from itertools import chain
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ...core.errors import RequestError
from .logs import SERVER
from .offers import RequestParser

MOST_HEADER_BYTES = 65_536  # of a request's line and headers
MOST_HEADER_SECONDS = 10.0  # from their first byte to their last
LOOK_FIRST, LOOK_EVERY = 0.01, 0.25  # seconds, whether a client that has stopped sending is still there
LOOK_WHETHER_READ_EVERY = 10.0  # seconds, in which so many bytes of an answer are to be read:
LEAST_READ = 100_000
PIECE = 4096  # bytes of frames: 256 KB, as they come, of pings keep everybody else waiting for 0.2 seconds
CLOSE_SECONDS = 4.0  # at the server's end, for the rest of a request, and for reading an answer
GOODBYE_SECONDS = 1.0  # for a WebSocket's answer to the server's close; uvicorn waits for 10
SAY_EVERY = 10.0  # seconds
LOOK_FOR_FILES_EVERY = 1.0  # seconds
FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
LOG = logging.getLogger(SERVER)


class _EndsForSlowReaders:
    """Of either protocol: closed where an answer is read too slowly; where too much waits to be read, the one goes that has not
    read for longest. At the server's end nobody slow is waited for."""

    most_unread: ClassVar[int] = 2**28  # bytes
    unread: ClassVar[dict[_EndsForSlowReaders, None]] = {}  # with answers that wait to be read, the longest first
    closing: ClassVar[dict[_EndsForSlowReaders, None]] = {}  # WebSockets that were told to close, the longest first
    loop: asyncio.AbstractEventLoop
    transport: Any
    _read_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self.unread[self] = None
        while sum(one.transport.get_write_buffer_size() for one in self.unread) > self.most_unread:
            oldest = next(iter(self.unread))
            oldest.transport.abort()
            oldest._has_read()
        self._look_whether_read(None)

    def resume_writing(self) -> None:
        self._has_read()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_read()
        super().connection_lost(exc)  # type: ignore[misc]

    def _look_whether_read(self, before: int | None) -> None:
        now = self.transport.get_write_buffer_size()
        if before is not None and now > before - LEAST_READ:
            self.transport.abort()
        elif self in self.unread:
            self._read_timer = self.loop.call_later(LOOK_WHETHER_READ_EVERY, self._look_whether_read, now)

    def _has_read(self) -> None:
        self.unread.pop(self, None)
        if self._read_timer is not None:
            self._read_timer.cancel()

    def shutdown(self) -> None:
        super().shutdown()  # type: ignore[misc]
        self._close_when_answered(was_slow=False)

    def _close_when_answered(self, *, was_slow: bool) -> None:
        if was_slow and self.is_slow:
            self.transport.abort()
        else:
            self.loop.call_later(CLOSE_SECONDS, lambda slow=self.is_slow: self._close_when_answered(was_slow=slow))

    @property
    def is_slow(self) -> bool:
        """Whether it is the client that is waited for."""
        return True


class Stream(_EndsForSlowReaders, WebSocketsSansIOProtocol):
    """A WebSocket. Many small frames are taken in pieces, with everybody else's between them, and who does not read what is sent
    is not listened to, since each ping is answered."""

    _rest = b""  # of what was received

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.close_timeout = GOODBYE_SECONDS

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing.pop(self, None)
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent:
            self.closing[self] = None

    def data_received(self, data: bytes) -> None:
        had_some, self._rest = bool(self._rest), self._rest + data
        if not had_some:
            self._take_a_piece()
        self._listen_or_not()

    def _take_a_piece(self) -> None:
        piece, self._rest = self._rest[:PIECE], self._rest[PIECE:]
        super().data_received(piece)
        if self.transport.is_closing():
            self._rest = b""
        elif self._rest:
            self.loop.call_soon(self._take_a_piece)
        self._listen_or_not()

    async def receive(self) -> Any:
        message = await super().receive()
        self._listen_or_not()  # whatever it has done
        return message

    def pause_writing(self) -> None:
        super().pause_writing()
        self._listen_or_not()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._listen_or_not()

    def _listen_or_not(self) -> None:
        if self._rest or self.read_paused or self in self.unread:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


class Connection(_EndsForSlowReaders, HttpToolsProtocol):
    """Closed where its request does not begin within the keep-alive time, or its headers do not end. Where too many are open,
    a WebSocket that was told to close goes, else the one that has been without a whole request for longest; slow ones keep
    nobody out."""

    most: ClassVar[int] = 1024
    unasked: ClassVar[dict[_EndsForSlowReaders, None]] = {}  # without a whole request, the longest first
    _said: ClassVar[float] = 0.0

    parser: Any  # a RequestParser
    _timer: asyncio.TimerHandle | None = None
    _in_headers, _bytes = False, 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.parser = RequestParser(self)
        if len(self.connections) > self.most:
            self._make_room()
        self.unasked[self] = None
        self._close_in(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        self.unasked.pop(self, None)
        self._close_in(None)
        self._unset_keepalive_if_required()  # uvicorn keeps it of a connection that was reset, and the connection with it
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_headers and not self.transport.is_closing():
            self._bytes += len(data)
            if self._bytes > MOST_HEADER_BYTES:
                self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._bytes = True, 0
        self._close_in(MOST_HEADER_SECONDS)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._close_in(None)
        if not self.parser.reads_again:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.reads_again:
            self.unasked.pop(self, None)
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self.unasked[self] = None

    def handle_websocket_upgrade(self) -> None:
        self.unasked.pop(self, None)
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        LOG.warning("invalid request of %s", (self.client or ("nobody",))[0])
        super().send_400_response(msg)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Who sends no more may still read: `nc` and scripts do. Who has closed altogether looks the same until they are sent
        something, so they are: an interim answer, which clients skip."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or not hasattr(select, "poll"):
            return False
        cycle.keep_alive = False
        if not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._look_in(LOOK_FIRST)  # the interim answer may leave with the loop's next turn only
        return True

    def _look_in(self, seconds: float) -> None:
        self._close_in(None)
        self._timer = self.loop.call_later(seconds, self._look_whether_there)

    def _look_whether_there(self) -> None:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)  # errors and hang-ups are always told
        if poll.poll(0):
            self.transport.abort()
        elif not self.cycle.response_complete:
            self._look_in(LOOK_EVERY)

    @property
    def is_slow(self) -> bool:
        return self.cycle is None or self.cycle.more_body or self.cycle.response_complete

    def _make_room(self) -> None:
        cls = type(self)
        if time.monotonic() > cls._said + SAY_EVERY:
            cls._said = time.monotonic()
            LOG.warning("%d connections are open, the most there may be: a new one ends the slowest", self.most)
        slowest = next(chain(self.closing, self.unasked), None)
        if slowest is None:
            self.transport.write(FULL)
            self.transport.close()
        else:
            for slow in (self.closing, self.unasked):
                slow.pop(slowest, None)  # now: of a hundred that come at once, each needs another's place
            slowest.transport.abort()

    def _close_in(self, seconds: float | None) -> None:
        """None: not any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)


SPARE_FILES, LEAST = 64, 8  # files of the model, its workers, the log; connections


def at_most(connections: int, unread: int) -> tuple[type[Connection], type[Stream]]:
    """The protocols of one server. connections: fewer where the system gives this process fewer files, so that accepting does not
    fail; unread: bytes of answers. Raises RequestError where there are hardly any files."""
    if (files := _files()) < SPARE_FILES + LEAST:
        least = SPARE_FILES + LEAST
        raise RequestError(f"this process may open {files} files, a server needs {least}; run: ulimit -n 1024")
    both = {"most_unread": unread, "unread": {}, "closing": {}}
    most = min(connections, files - SPARE_FILES)
    return type("Connection", (Connection,), {**both, "most": most, "unasked": {}}), type("Stream", (Stream,), both)


async def watch_files() -> None:
    """Says where no file can be opened any more: the event loop closes new connections then, and says nothing."""
    while True:
        pause = LOOK_FOR_FILES_EVERY
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            pause = SAY_EVERY
            LOG.error("new connections are not accepted: %s; raise LimitNOFILE, or ulimit -n", error.strerror)
        await asyncio.sleep(pause)


def _files() -> int:
    """That this process may open, raised as far as it may raise it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 2**20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**20)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        soft = max(soft, most)
    return 2**20 if soft == resource.RLIM_INFINITY else soft
