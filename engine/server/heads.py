"""uvicorn's HTTP connections, which wait for a request's headers without an end: here these are limited in bytes and time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES = 65_536  # of a request's line and headers
MOST_SECONDS = 10.0  # from their first byte to their last


class LimitedHeads(HttpToolsProtocol):
    """Closes a connection whose request does not begin within the keep-alive time, or whose headers do not end."""

    _timer: asyncio.TimerHandle | None = None
    _in_head, _bytes = False, 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._close_in(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        self._close_in(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._bytes += len(data)
            if self._bytes > MOST_BYTES:
                self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._bytes = True, 0
        self._close_in(MOST_SECONDS)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._close_in(None)
        super().on_headers_complete()

    def _close_in(self, seconds: float | None) -> None:
        """None: not any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)
