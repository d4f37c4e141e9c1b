"""What stands in Ray's proxies before the replicas: nothing that was asked is lost with a replica that dies."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_body
from .guard import MOST_SILENCE, SAFE, body_limit, headers_of
from .logs import SERVER
from .settings import ServerSettings

TRIES = 3
TRIES_OF_UPLOADS = 2  # a picture that kills whoever unpacks it is not to end every replica
OF_A_REPLICA = SAFE[0]  # the header of whatever `Guard` has let through
LIMITS = ServerSettings()  # those of every replica
SERVICE_RESTART, TRY_AGAIN_LATER = 1012, 1013
LOG = logging.getLogger(SERVER)


class SecondTry:
    """ASGI middleware. A request whose replica ends before its answer is whole goes to another one, up to TRIES times, where
    it brings pictures TRIES_OF_UPLOADS times; then it is a 503. A WebSocket is closed with 1012, and its client connects again.

    Drawing changes nothing, so a request may be made twice. Answers are held until they are whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        most, announced = body_limit(scope["path"], headers, LIMITS), headers.get("content-length", "")
        client = _Client(receive)
        try:
            body = None if announced.isdigit() and int(announced) > most else await client.body(most)
        except TimeoutError:
            await _error(send, 408, "timeout", f"{MOST_SILENCE:g} seconds without the rest of the request")
            return
        if client.gone:
            return
        if body is None:
            await _error(send, 413, "too_large", f"the request has more than {most:,} bytes")
            return
        for _ in range(TRIES if most == LIMITS.max_body else TRIES_OF_UPLOADS):
            answer: list[Message] = []
            await self._ask(scope, client.again(body), answer)
            if client.gone:
                return
            if answer and not answer[-1].get("more_body", answer[-1]["type"] == "http.response.start"):
                marked = dict.fromkeys(map(tuple, answer[0].get("headers", ())))  # each once: Ray adds the id again
                if OF_A_REPLICA not in marked and not scope["path"].startswith("/-/"):
                    break  # Ray's own: no replica was asked
                answer[0]["headers"] = list(marked)
                for message in answer:
                    await send(message)
                return
            LOG.warning("a replica ended while it drew; its request is asked again")
            await asyncio.sleep(0.05)
        await _error(send, 503, "no_replica", "no replica is there to draw; try again in a moment")

    async def _ask(self, scope: Scope, receive: Receive, answer: list[Message]) -> None:
        async def keep(message: Message) -> None:
            answer.append(message)

        try:
            await self.app({**scope, "headers": list(scope["headers"])}, receive, keep)
        except Exception:  # the proxy's own, of a replica that is gone: what counts is whether there is an answer
            LOG.exception("no answer from a replica")

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = {"open": False, "over": False}

        async def heard() -> Message:
            message = await receive()
            state["over"] |= message["type"] == "websocket.disconnect"
            return message

        async def told(message: Message) -> None:
            state["open"] |= message["type"] == "websocket.accept"
            state["over"] |= message["type"] == "websocket.close" or message["type"].startswith("websocket.http")
            await send(message)

        await self.app(scope, heard, told)
        if not state["over"]:
            await send({"type": "websocket.close", "code": SERVICE_RESTART if state["open"] else TRY_AGAIN_LATER})


class _Client:
    """Who asked: the body, which every try is given again, and whether somebody still waits."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.gone = receive, False

    async def body(self, most: int) -> bytes | None:
        """The whole body; None if it has more bytes than that. Raises TimeoutError where no more of it comes."""
        parts, size = [], 0
        while True:
            async with asyncio.timeout(MOST_SILENCE):
                message = await self._heard()
            if self.gone:
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    def again(self, body: bytes) -> Receive:
        """A `receive` that gives the body first."""
        first: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return first.pop() if first else await self._heard()

        return receive

    async def _heard(self) -> Message:
        message = await self._receive()
        self.gone |= message["type"] == "http.disconnect"
        return message


async def _error(send: Send, status: int, code: str, text: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error_body(text, code=code, status=status)).encode()})
