"""What every request passes before it reaches a route: its size, where it comes from, who asks; and its id in the log."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from .errors import error_body
from .logs import SERVER, now
from .settings import ServerSettings

OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/metrics")  # without a key
MOST_SILENCE = 10.0  # seconds, while a body is on its way
KEY_PROTOCOL = "imagine-flash.key."  # a WebSocket of a browser has no other header to put the key into
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")  # of a proxy in front, so that its log and ours agree
LOG = logging.getLogger(SERVER)


class Guard:
    """ASGI middleware. Refuses with 401, 403 or 413 before anything is read; logs one line of JSON per request, and what
    the application raises, which is answered with 500."""

    def __init__(self, app: Any, settings: ServerSettings, count: Callable[[str, int], None] | None = None) -> None:
        """count: called with the path and the status of every answer."""
        self.app, self.settings, self.count = app, settings, count or (lambda path, status: None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started, headers = time.perf_counter(), headers_of(scope)
        request_id = request_id_of(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status = [0]

        async def answer(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status[0] = message["status"]
            elif message["type"] == "websocket.accept":
                status[0] = 101
                self.count(scope["path"], 101)
            await send(signed(message, request_id))

        refused = self._refusal(scope, headers)
        try:
            if refused is not None:
                await refuse(scope, answer, *refused)
            else:
                await self._limited(scope, headers, receive, answer)
        except Exception as error:
            if status[0]:  # too late for an answer: the server breaks the connection
                raise
            LOG.error("unexpected error at %s", scope["path"][:200], exc_info=error)
            await refuse(scope, answer, 500, "internal", "the server failed; its log says why")
        finally:
            if status[0] != 101:
                self.count(scope["path"], status[0] or 499)
            _log(scope, request_id, status[0] or 499, time.perf_counter() - started)

    async def _limited(self, scope: Scope, headers: dict[str, str], receive: Receive, answer: Send) -> None:
        """Counts the body as it arrives: content-length may be absent, or a lie."""
        limit, seen, whole = body_limit(scope["path"], headers, self.settings), 0, scope["type"] != "http"
        silence = min(MOST_SILENCE, self.settings.timeout)

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(silence):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"{silence:g} seconds without the rest of the request") from None
            whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > limit:
                status, _, text = _too_large(limit)
                raise HTTPException(status, text)
            return message

        await self.app(scope, counted, answer)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        origin, host = headers.get("origin"), headers.get("host", "")
        changes = scope["type"] == "websocket" or scope.get("method") not in ("GET", "HEAD", "OPTIONS")
        if origin and changes and origin not in self.settings.allowed_origins and _is_foreign(origin, host, scope):
            return (
                403,
                "forbidden_origin",
                f"pages of {origin[:100]} may not call this server; --allow-origin lets them",
            )
        if self.settings.api_keys and not _is_open(scope["path"]) and not self._knows(headers):
            return 401, "invalid_api_key", "give one of the server's keys as 'Authorization: Bearer KEY'"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > (limit := body_limit(scope["path"], headers, self.settings)):
            return _too_large(limit) if length.isdigit() else (400, "bad_request", "content-length is no number")
        return None

    def _knows(self, headers: dict[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            offered = [part.strip() for part in headers.get("sec-websocket-protocol", "").split(",")]
            given = next((p.removeprefix(KEY_PROTOCOL) for p in offered if p.startswith(KEY_PROTOCOL)), "")
        known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.settings.api_keys]
        return any(known)  # all were compared: the time says nothing


SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-cache"),  # an updated page does not meet the parts of the old one
]


def body_limit(path: str, headers: Mapping[str, str], settings: ServerSettings) -> int:
    """Bytes that a request's body may have; the names of the headers in lower case."""
    upload = path == "/v1/images/edits" and headers.get("content-type", "").lower().startswith("multipart/")
    return settings.max_upload if upload else settings.max_body


def _is_foreign(origin: str, host: str, scope: Scope) -> bool:
    """Whether a page is another host's. On a loopback address only loopback names are its own: any other may be a stranger's
    that was made to lead here (DNS rebinding), and a proxy's name is to be allowed by --allow-origin."""
    if origin.partition("://")[2] != host:
        return True
    return _is_loopback((scope.get("server") or ("",))[0]) and not _is_loopback(_hostname(host))


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    """0.0.0.0 among them: it leads here, and nobody else can have it."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith("/page/")


def _too_large(limit: int) -> tuple[int, str, str]:
    return 413, "too_large", f"the request has more than {limit:,} bytes"


def headers_of(scope: Scope) -> dict[str, str]:
    """By their names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope.get("headers", ())}


def request_id_of(headers: Mapping[str, str]) -> str:
    """What a proxy in front calls the request, else one of our own."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def signed(message: Message, request_id: str) -> Message:
    """An answer's first message with the headers that all of ours have; others as they are."""
    if message["type"] in ("http.response.start", "websocket.http.response.start"):
        message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *SAFE]
    return message


async def refuse(scope: Scope, send: Send, status: int, code: str, message: str) -> None:
    """A JSON error; of a WebSocket, in place of its handshake where the server can, else by closing it."""
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    if kind.startswith("websocket") and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps(error_body(message, code=code, status=status)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


def _log(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    line = {
        "time": now(),
        "request_id": request_id,
        "kind": scope["type"],
        "method": scope.get("method", "GET"),
        "path": scope["path"][:200],
        "status": status,
        "ms": round(1000 * seconds, 2),
        "client": (scope.get("client") or ("",))[0],
    }
    LOG.info(json.dumps(line))
