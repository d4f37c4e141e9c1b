"""Requests that offer to go on in another protocol, as curl's and Java's do in HTTP/2 (`Upgrade: h2c`): a server may overlook
that."""

from __future__ import annotations

from contextlib import suppress

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class RequestParser:
    """httptools' parser of a connection. It stops after headers with an offer, as if all that follows were in the other protocol;
    but for a WebSocket's, they are read again without the offer, and then what follows."""

    def __init__(self, connection: HttpToolsProtocol) -> None:
        self._connection = connection
        self._parser = self._new()

    @property
    def reads_again(self) -> bool:
        """Whether the headers that end now are not the ones to answer, but come again without their offer."""
        return self.should_upgrade() and self.get_method() != b"CONNECT" and not self._connection._should_upgrade()

    def feed_data(self, data: bytes) -> None:
        """Raises HttpParserError, and HttpParserUpgrade after a WebSocket's headers."""
        rest = memoryview(data)
        while rest:
            try:
                return self._parser.feed_data(rest)
            except httptools.HttpParserUpgrade as stopped:
                if not self.reads_again:
                    raise
                head, rest = self._head(), rest[stopped.args[0] :]
                self._parser = self._new()  # this one takes nothing more of a request that ends its connection
                self._parser.feed_data(head)

    def _new(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self._connection)
        with suppress(AttributeError):  # httptools before 0.6.3 has not this
            parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        return parser

    def _head(self) -> bytes:
        """The request's line and headers, without the offer."""
        line = b"%s %s HTTP/%s\r\n" % (self.get_method(), self._connection.url, self.get_http_version().encode())
        headers = [b"%s: %s\r\n" % (name, value) for name, value in self._connection.headers if name != b"upgrade"]
        return b"".join([line, *headers, b"\r\n"])

    def get_method(self) -> bytes:
        return self._parser.get_method()

    def get_http_version(self) -> str:
        return self._parser.get_http_version()

    def should_keep_alive(self) -> bool:
        return self._parser.should_keep_alive()

    def should_upgrade(self) -> bool:
        return self._parser.should_upgrade()
