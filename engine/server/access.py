"""What every request passes before it reaches a route: where it comes from, who asks, how much it sends and for how long."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .clients import Clients, KnownClient
from .errors import error_body
from .logs import SERVER
from .settings import ServerSettings

BARE = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")  # the same for everybody
OPEN = (*BARE, "/metrics")  # without a key
OPEN_FOLDERS = ("/page/", "/pictures/")
PROBES = ("/healthz", "/readyz", "/metrics")  # not worth a line of the log
MOST_SILENCE = 10.0  # seconds, while a body is on its way
JSON_PARTS = b"[{,"  # 20 MB of them are 4 seconds of parsing, those of a picture in base64 next to none
CLOSE = {"connection": "close"}  # the rest of the body is not wanted
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-cache"),  # an updated page does not meet the parts of the old one
]
LOG = logging.getLogger(SERVER)


class RequestLog:
    """ASGI middleware, the outermost: one line for each request, and the headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # of who hung up before

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *SAFE]
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            if not (scope["path"] in PROBES and status == 200):
                _log(scope, status, time.perf_counter() - started)


def _log(scope: Scope, status: int, seconds: float) -> None:
    client: KnownClient | None = scope.get("state", {}).get("client")
    line = {
        "kind": scope["type"],
        "method": scope.get("method", "GET"),
        "path": _path(scope),
        "status": status,
        "ms": round(1000 * seconds, 2),
        "client": (scope.get("client") or ("",))[0],
    }
    if client is not None and client.label:
        line["key"] = client.label
    LOG.info("%(client)s %(method)s %(path)s %(status)s %(ms)s ms", line, extra=line)


def _path(scope: Scope) -> str:
    """As it was sent, without the query: decoded, it may hold the ends of lines."""
    return quote(scope["path"][:200], safe="/:@!$&'()*+,;=")


class Access:
    """ASGI middleware. Refuses with 401, 403, 408, 413 or 503 before anything is drawn; what the application raises is logged
    and answered with 500."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, clients: Clients) -> None:
        self.app, self.settings, self.clients = app, settings, clients
        self._held = 0  # bytes of all bodies that are here and not yet answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await refuse(scope, send, *refusal)
            return
        has_begun = False

        async def answer(message: Message) -> None:
            nonlocal has_begun
            has_begun |= message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start")
            await send(message)

        body = _Body(self, scope, headers, receive)
        try:
            await self.app(scope, body.receive, answer)
        except Exception as error:
            if has_begun:  # too late for an answer: the server breaks the connection
                raise
            LOG.error("unexpected error at %s", _path(scope), exc_info=error)
            await refuse(scope, answer, 500, "internal", "the server failed; its log says why")
        finally:
            self._held -= body.size

    def take(self, size: int) -> None:
        """Room for so many bytes. Raises HTTPException."""
        self._held += size
        if self._held > self.settings.max_memory:
            raise HTTPException(503, "too many uploads are on their way; try again in a moment", {"retry-after": "1"})

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        origin, host = headers.get("origin"), headers.get("host", "")
        changes = scope["type"] == "websocket" or scope.get("method") not in ("GET", "HEAD", "OPTIONS")
        if origin and changes and origin not in self.settings.allow_origin and _is_foreign(origin, host, scope):
            message = f"pages of {origin[:100]} may not call this server; --allow-origin lets them"
            return 403, "forbidden_origin", message
        if not changes and self._may_be_rebound(scope, origin, host):
            message = f"{host[:100]} is no name of this server; --allow-origin http://{host[:100]} makes it one"
            return 403, "forbidden_host", message
        client = self.clients.identify(scope, headers)
        if client is not None:
            scope.setdefault("state", {})["client"] = client
        elif scope["path"] not in OPEN and not scope["path"].startswith(OPEN_FOLDERS):
            return 401, "invalid_api_key", "give one of the server's keys as 'Authorization: Bearer KEY'"
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return 400, "bad_request", "content-length is no number"
        if int(length) > (limit := body_limit(scope["path"], headers, self.settings)):
            return 413, "too_large", f"the request has more than {limit:,} bytes"
        return None

    def _may_be_rebound(self, scope: Scope, origin: str | None, host: str) -> bool:
        """Whether a page may be reading that made its own name lead here; its requests say no origin then. Only a server for this
        machine alone is kept from them: another one can be reached by an address that anybody has a name for."""
        if scope["path"] in BARE or scope["path"].startswith(OPEN_FOLDERS) or origin in self.settings.allow_origin:
            return False
        here = is_loopback(self.settings.host) and is_loopback((scope.get("server") or ("",))[0])
        names = {_hostname(allowed.partition("://")[2]) for allowed in self.settings.allow_origin}
        return here and host != "" and not _leads_here(_hostname(host)) and _hostname(host) not in names


class _Body:
    """A request's body as it arrives: content-length may be absent, or a lie."""

    def __init__(self, access: Access, scope: Scope, headers: Mapping[str, str], receive: Receive) -> None:
        self._access, self._receive = access, receive
        self._limit = body_limit(scope["path"], headers, access.settings)
        self._whole = scope["type"] != "http"
        self._is_json, self._parts = scope["path"].startswith("/sdapi/"), 0
        self._ends = time.monotonic() + access.settings.body_timeout
        self.size = 0

    async def receive(self) -> Message:
        """The next part. Raises HTTPException."""
        if self._whole:
            return await self._receive()
        silence = min(MOST_SILENCE, self._access.settings.timeout)
        left = self._ends - time.monotonic()
        try:
            async with asyncio.timeout(min(silence, left)):
                message = await self._receive()
        except TimeoutError:
            seconds = silence if silence < left else self._access.settings.body_timeout
            raise HTTPException(408, f"{seconds:g} seconds without the rest of the request", CLOSE) from None
        self._whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.size += size
        self._access.take(size)
        if self.size > self._limit:
            raise HTTPException(413, f"the request has more than {self._limit:,} bytes", CLOSE)
        if self._is_json:
            self._parts += size - len(message.get("body", b"").translate(None, JSON_PARTS))
            if self._parts > (most := self._access.settings.max_body):
                raise HTTPException(413, f"the request has more than {most:,} fields and items", CLOSE)
        return message


def body_limit(path: str, headers: Mapping[str, str], settings: ServerSettings) -> int:
    """Bytes that a request's body may have; the names of the headers in lower case."""
    upload = path == "/v1/images/edits" and headers.get("content-type", "").lower().startswith("multipart/")
    return settings.max_upload if upload or path.startswith("/sdapi/") else settings.max_body


def _is_foreign(origin: str, host: str, scope: Scope) -> bool:
    """Whether a page is another host's. On a loopback address only loopback names are its own: any other may be a stranger's
    that was made to lead here (DNS rebinding), and a proxy's name is to be allowed by --allow-origin."""
    if origin.partition("://")[2] != host:
        return True
    return is_loopback((scope.get("server") or ("",))[0]) and not _leads_here(_hostname(host))


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _leads_here(name: str) -> bool:
    """0.0.0.0 among them: it does, and nobody else can have it."""
    return is_loopback(name) or name in ("0.0.0.0", "::")


def is_loopback(name: str) -> bool:
    """Whether a name or an address is this machine's alone; one of IPv4 also as IPv6 writes it."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


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
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
