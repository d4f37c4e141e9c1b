"""Where a command listens, and how its server does."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..core.errors import ImagineFlashError, RequestError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from ..engine.server.settings import ServerSettings


@contextmanager
def options_as_typed(given: set[str]) -> Iterator[None]:
    """A setting that cannot be is called by its option: --max-queue, not max_queue."""
    try:
        yield
    except ImagineFlashError as error:
        name = str(error).partition(" ")[0].rstrip(":")
        if name not in given:
            raise
        raise type(error)("--" + name.replace("_", "-") + str(error).removeprefix(name)) from None


def url_of(host: str, listening: socket.socket) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listening.getsockname()[1]}"


def listen(host: str, port: int) -> socket.socket:
    """Raises RequestError."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OverflowError:
        raise RequestError(f"port must be 0 to 65535, got {port}") from None
    except OSError as error:
        raise RequestError(
            f"cannot listen at {host}:{port} ({str(error.strerror).partition(' (')[0]}); choose another --port or --host"
        ) from None


def is_loopback(host: str) -> bool:
    """Raises RequestError for what is no address."""
    from ..engine.server import access

    if access.is_loopback(host):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise RequestError(f"host must be an address such as 127.0.0.1 or 0.0.0.0, got {host!r}") from None
    return False


def configuration(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """Of the server: its protocols and limits. Raises RequestError."""
    import uvicorn

    from ..engine.server import connections
    from ..engine.server.messages import MAX_PICTURE

    http, stream = connections.at_most(settings.max_connections, settings.max_memory)
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        http=http,
        ws=stream,
        ws_max_size=max(settings.max_body, MAX_PICTURE),
        ws_ping_interval=20,
        ws_per_message_deflate=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxy),
        forwarded_allow_ips=list(settings.trusted_proxy),
    )
