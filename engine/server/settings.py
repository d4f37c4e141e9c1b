"""What a server may be asked for, checked before it starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field

from ...core.checked import Checked
from ...core.errors import RequestError
from ...folders.hub import local_folder
from ..engine import Engine
from ..loading import LoadOptions, check_loading

SHORTEST_KEY = 16  # characters
KEY = re.compile(rf"[A-Za-z0-9!#$%&'*+.^_`|~-]{{{SHORTEST_KEY},}}")  # of a WebSocket's subprotocol: RFC 6455, RFC 9110
ORIGIN = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
DEFAULT_PORT = {"http": 80, "https": 443}  # which browsers leave out


def _origin(given: str) -> str:
    """As a browser writes it: lower case, without a default port."""
    origin = given.lower()
    try:
        parts = urlsplit(origin)
        if not ORIGIN.fullmatch(origin) or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValueError("must be http://HOST or https://HOST, :PORT after it where it has one, and no path") from None
    default = parts.port == DEFAULT_PORT[parts.scheme]
    return origin.rpartition(":")[0] if default else origin


Origins = tuple[Annotated[str, AfterValidator(_origin)], ...]


class EngineSettings(LoadOptions):
    """What is loaded, and how: by a server once, on Ray by every replica."""

    model_config = ConfigDict(strict=False)  # YAML has no tuples

    model: Path | str | None = None
    max_waiting: int = Field(default=64, ge=1)

    def load(self) -> Engine:
        """Raises ArtifactError, MissingExtraError."""
        return Engine.load(self.model, self)

    def check(self, *, here: bool = True) -> None:
        """What loading would find wrong in its first second; a hub id's files, which loading fetches, excepted. here: it is
        this machine that draws. Raises ImagineFlashError."""
        processors = os.cpu_count() or 1
        if here and self.threads is not None and self.threads > processors:
            raise RequestError(
                f"threads: must be 1 to {processors}, the processors of this machine, got {self.threads}"
            )
        check_loading(self.model, self)


class ServerSettings(Checked):
    """Keyword-only, frozen; RequestError in one line for what cannot be.

    api_keys: who may draw; none means everybody who reaches the port. timeout: seconds that a request may take.
    max_body: bytes of a JSON request; max_upload: of an edit's pictures; max_pixels: of each of these, once unpacked.
    max_streams: WebSockets that may be open.
    allowed_origins: web pages of other hosts that may call, such as https://example.org.
    """

    api_keys: tuple[str, ...] = ()
    timeout: float = Field(default=60.0, gt=0, le=3600)
    max_body: int = Field(default=65_536, ge=1024)
    max_upload: int = Field(default=20_000_000, ge=1024)
    max_pixels: int = Field(default=16_777_216, ge=4096)
    max_streams: int = Field(default=512, ge=1)
    allowed_origins: Origins = ()


class RaySettings(EngineSettings):
    """The arguments of one replica on Ray. api_key_file: as all files, at the same place on every machine."""

    api_key_file: Path | None = None
    timeout: float = Field(default=60.0, gt=0, le=3600)
    allowed_origins: Origins = ()

    def server(self) -> ServerSettings:
        """Raises RequestError."""
        keys = () if self.api_key_file is None else read_keys(self.api_key_file)
        return ServerSettings(api_keys=keys, timeout=self.timeout, allowed_origins=self.allowed_origins)

    def check(self, *, here: bool = True) -> None:
        """As of EngineSettings, and the keys; a hub id is fetched once, not by every replica. Raises ImagineFlashError."""
        self.server()
        super().check(here=here)
        if self.model is not None:
            local_folder(self.model)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; lines that begin with # are skipped. Raises RequestError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise RequestError(f"cannot read the keys in {path}: {reason}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if not keys:
        raise RequestError(f"{path} holds no key; write one a line, such as the output of: openssl rand -hex 32")
    for number, key in enumerate(keys, 1):
        if not KEY.fullmatch(key):
            raise RequestError(
                f"key {number} of {path} must have {SHORTEST_KEY} or more letters, digits or !#$%&'*+.^_`|~-, which is all "
                "that a browser can send with a WebSocket; make one with: openssl rand -hex 32"
            )
    return keys
