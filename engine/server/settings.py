"""What a server may be asked for, checked before it starts."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from ...core.checked import Checked
from ...core.errors import RequestError

SHORTEST_KEY = 16  # characters
KEY = re.compile(rf"[A-Za-z0-9!#$%&'*+.^_`|~-]{{{SHORTEST_KEY},}}")  # of a WebSocket's subprotocol: RFC 6455, RFC 9110


class ServerSettings(Checked):
    """Keyword-only, frozen; RequestError in one line for what cannot be.

    api_keys: who may draw; none means everybody who reaches the port. timeout: seconds that a request may take.
    max_body: bytes of a JSON request; max_upload: of an edit's pictures; max_pixels: of each of these, once unpacked.
    allowed_origins: web pages of other hosts that may call, such as https://example.org.
    """

    api_keys: tuple[str, ...] = ()
    timeout: float = Field(default=60.0, gt=0, le=3600)
    max_body: int = Field(default=65_536, ge=1024)
    max_upload: int = Field(default=20_000_000, ge=1024)
    max_pixels: int = Field(default=16_777_216, ge=4096)
    allowed_origins: tuple[str, ...] = ()


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; lines that begin with # are skipped. Raises RequestError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise RequestError(f"cannot read the keys in {path}: {reason}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if not keys:
        raise RequestError(f"{path} holds no key; write one a line, such as the output of: openssl rand -hex 32")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise RequestError(
                f"key {number} of {path} must have {SHORTEST_KEY} or more plain characters without spaces"
            )
    return keys
