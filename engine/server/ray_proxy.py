"""What stands in Ray's proxies before the replicas: nothing that was asked is lost with a replica that dies."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .guard import SAFE, body_limit, headers_of, refuse, request_id_of, signed
from .logs import SERVER
from .settings import ServerSettings

TRIES = 3
TRIES_OF_UPLOADS = 2  # a picture that kills whoever unpacks it is not to end every replica
MOST_KEPT = 268_435_456  # bytes of all bodies in a proxy; as many again are on their way to replicas
LONGEST_BODY = 120.0  # seconds from its first byte to its last
OF_A_REPLICA = SAFE[0]  # the header of whatever `Guard` has let through
LIMITS = ServerSettings()  # those of every replica
SERVICE_RESTART, TRY_AGAIN_LATER = 1012, 1013
LOG = logging.getLogger(SERVER)


class SecondTry:
    """ASGI middleware. A request whose replica ends before its answer is whole goes to another one, up to TRIES times, where
    it brings pictures TRIES_OF_UPLOADS times; then it is a 503. A WebSocket is closed with 1012, and its client connects again.

    Drawing changes nothing, so a request may be made twice. A body goes to the replica while it arrives, so that the key is
    checked first, and is kept for the next try. Answers are held until they are whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._bodies = _Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        request_id = request_id_of(headers)
        named = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        asked = {**scope, "headers": [*named, (b"x-request-id", request_id.encode())]}
        client = _Client(receive, body_limit(scope["path"], headers, LIMITS), self._bodies)
        try:
            answer = await self._answer(asked, client)
        finally:
            self._bodies.kept -= client.kept
        if client.refused:
            await refuse(scope, lambda message: send(signed(message, request_id)), *client.refused)
        elif not client.gone:
            for message in answer:
                await send(message)

    async def _answer(self, scope: Scope, client: _Client) -> list[Message]:
        """A whole one; what it holds counts only where the client is neither gone nor refused."""
        for _ in range(TRIES if client.most == LIMITS.max_body else TRIES_OF_UPLOADS):
            answer: list[Message] = []
            await self._ask(scope, client.again(), answer)
            if client.gone or client.refused:
                return []
            if answer and not answer[-1].get("more_body", answer[-1]["type"] == "http.response.start"):
                marked = dict.fromkeys(map(tuple, answer[0].get("headers", ())))  # each once: Ray adds the id again
                if OF_A_REPLICA not in marked and not scope["path"].startswith("/-/"):
                    break  # Ray's own: no replica was asked
                answer[0]["headers"] = list(marked)
                return answer
            LOG.warning("a replica ended while it drew; its request is asked again")
            await asyncio.sleep(0.05)
        client.refused = 503, "no_replica", "no replica is there to draw; try again in a moment"
        return []

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


class _Bodies:
    """Of all requests in this proxy."""

    kept = 0  # bytes


class _Client:
    """Who asked: the body as far as it has come, which every try is given again, and whether somebody still waits.

    refused: the status, code and text of an answer that no replica gives.
    """

    def __init__(self, receive: Receive, most: int, all_bodies: _Bodies) -> None:
        self._receive, self.most, self._all = receive, most, all_bodies
        self._body: list[Message] = []
        self._deadline = asyncio.get_running_loop().time() + LONGEST_BODY
        self.kept, self.gone = 0, False
        self.refused: tuple[int, str, str] | None = None

    def again(self) -> Receive:
        """A `receive` that begins with the body's first byte, and ends when nobody waits any more."""
        told = 0

        async def receive() -> Message:
            nonlocal told
            if told == len(self._body):
                await self._hear()
            if self.gone or self.refused:
                return {"type": "http.disconnect"}
            told += 1
            return self._body[told - 1]

        return receive

    async def _hear(self) -> None:
        """The next part of the body, or after its last one the client's end."""
        whole = bool(self._body) and not self._body[-1].get("more_body", False)
        try:
            async with asyncio.timeout_at(None if whole else self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refused = 408, "timeout", f"after {LONGEST_BODY:g} seconds there is more of the request to come"
            return
        if message["type"] == "http.disconnect":
            self.gone = True
            return
        self._body.append(message)
        size = len(message.get("body", b""))
        self.kept += size
        self._all.kept += size
        if self.kept > self.most:
            self.refused = 413, "too_large", f"the request has more than {self.most:,} bytes"
        elif self._all.kept > MOST_KEPT:
            self.refused = 503, "busy", "too many uploads are on their way; try again in a moment"
