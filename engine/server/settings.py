"""What a server may be asked for, checked before it starts."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import limits
import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from ...core.checked import Checked
from ...core.errors import RequestError
from ...folders.loras import parse_named
from ..engine import Engine
from ..loading import ExecutionOptions, LoadOptions, check_loading

SHORTEST_KEY = 16  # characters
KEY = re.compile(rf"[A-Za-z0-9!#$%&'*+.^_`|~-]{{{SHORTEST_KEY},}}")  # of a WebSocket's subprotocol: RFC 6455, RFC 9110
ORIGIN = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
EVERYBODY = "*"
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


def _quota(given: str | None) -> str | None:
    if given is not None:
        try:
            if not all(quota.amount for quota in limits.parse_many(given)):
                raise ValueError
        except ValueError:
            raise ValueError("must be NUMBER/minute, /hour or /day, 1 or more, several with ; between them") from None
    return given


def _proxy(given: str) -> str:
    """As uvicorn compares it: an address, or a network without the bits of a host."""
    if given == EVERYBODY:
        return given
    try:
        network = ipaddress.ip_network(given, strict=False)
    except ValueError:
        raise ValueError(
            f"must be an address such as 127.0.0.1, a network such as 10.0.0.0/8, or {EVERYBODY}"
        ) from None
    return str(network) if "/" in given else given


Quota = Annotated[str | None, AfterValidator(_quota)]


class ApiKey(Checked):
    """Somebody who may draw. name: in the log and in metrics; weight: of their share of the engine; quota: of pictures, such as
    "100/minute; 5000/day", instead of the server's."""

    key: str
    name: str = Field(default="", max_length=40, pattern=r"^[\w.@-]*$")
    weight: float = Field(default=1.0, gt=0, le=1000)
    quota: Quota = None

    @field_validator("key")
    @classmethod
    def _can_be_sent(cls, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(
                f"must have {SHORTEST_KEY} or more letters, digits or !#$%&'*+.^_`|~-, which is all that a browser can send "
                "with a WebSocket; make one with: openssl rand -hex 32"
            )
        return key

    @classmethod
    def one_line(cls, name: str, kind: str, message: str, value: Any) -> str:
        """As of any setting, but a key is never shown."""
        return super().one_line(name, kind, message, "***" if name == "key" else value).removesuffix(", got '***'")


class ServerSettings(ExecutionOptions):
    """The options of `imagine-flash serve`, by the same names: keyword-only, frozen; RequestError in one line for what cannot be.

    Those of ExecutionOptions, and model: as of `Engine.load`. tiny_decoder: the folder or hub id of one that decodes instead of the
    model's own, or none. controlnet: that of a ControlNet or T2I-adapter for the model; with ray both on one machine only.
    lora: those that requests may ask for, by name, or "NAME=PATH". max_queue: pictures that may wait.
    api_key_file, api_keys: who may draw; none means everybody who reaches the port. quota: of pictures of each key, or without
    keys of each address, such as "100/minute; 5000/day". allow_origin: web pages of other hosts that may call.
    trusted_proxy: addresses or networks of proxies whose x-forwarded-for says who asks; "*" is anybody's.
    alias: further names of the model. image_urls: whether response_format=url gives an address of this server, where the picture
    is for an hour, or a data: URL.
    timeout: seconds that a request may take; body_timeout: until all of it is here. max_body: bytes of a JSON request;
    max_upload: of an edit's pictures; max_pixels: of each of these, once unpacked. max_memory: bytes of all requests that are
    on their way, and of pictures behind URLs. max_streams: WebSockets that may be open; max_connections: all connections.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model: Path | str | None = None
    tiny_decoder: str | None = None
    lora: dict[str, str] = Field(default_factory=dict)
    controlnet: str | None = None
    max_queue: int = Field(default=64, ge=1)
    ray: bool = False
    replicas: int | None = Field(default=None, ge=1)
    api_key_file: Path | None = None
    api_keys: tuple[ApiKey, ...] = ()
    quota: Quota = None
    allow_origin: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    trusted_proxy: tuple[Annotated[str, AfterValidator(_proxy)], ...] = ()
    alias: tuple[str, ...] = ()
    image_urls: Literal["stored", "data"] = "stored"
    timeout: float = Field(default=60.0, gt=0, le=3600)
    body_timeout: float = Field(default=60.0, gt=0, le=3600)
    max_body: int = Field(default=65_536, ge=1024)
    max_upload: int = Field(default=20_000_000, ge=1024)
    max_pixels: int = Field(default=16_777_216, ge=4096)
    max_memory: int = Field(default=2**28, ge=2**20)
    max_streams: int = Field(default=512, ge=1)
    max_connections: int = Field(default=1024, ge=8)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"

    @classmethod
    def one_line(cls, name: str, kind: str, message: str, value: Any) -> str:
        """As of any setting, but keys are never shown."""
        line = super().one_line(name, kind, message, value if name != "api_keys" else "them")
        return line.removesuffix(", got 'them'")

    @field_validator("allow_origin", "trusted_proxy", "alias", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given or ()

    @field_validator("lora", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return given
        found = parse_named((given,) if isinstance(given, str) else given or ())
        for lora in found.values():
            if lora.weight != 1:
                raise ValueError(f"requests say the weight; leave out :{lora.weight:g}")
        return {name: lora.name for name, lora in found.items()}

    @field_validator("api_keys", mode="before")
    @classmethod
    def _plain_keys(cls, given: Any) -> Any:
        plain: Any = ({"key": one} if isinstance(one, str) else one for one in given or ())
        return tuple(one if isinstance(one, ApiKey) else ApiKey(**one) for one in plain)

    @field_validator("api_keys")
    @classmethod
    def _each_has_a_name_of_its_own(cls, given: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        """By which its quota, its share and its metrics are known."""
        names = [key.name for key in given if key.name]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"each needs a name of its own, but two are named {twice[0]!r}")
        return given

    @model_validator(mode="after")
    def _replicas_need_ray(self) -> Self:
        if self.replicas is not None and not self.ray:
            raise ValueError(f"replicas: go with ray, got {self.replicas}")
        return self

    def with_keys(self) -> ServerSettings:
        """The same with the keys of its key file. Raises RequestError."""
        if self.api_key_file is None:
            return self
        keys = (*self.api_keys, *read_keys(self.api_key_file))
        return type(self)(**{**dict(self), "api_keys": keys, "api_key_file": None})

    @property
    def loading(self) -> LoadOptions:
        """As of `Engine.load`. Raises RequestError."""
        for name in ("controlnet", "tiny_decoder"):
            if (value := getattr(self, name)) not in (None, "none"):
                raise RequestError(
                    f"{name}: goes with a server on this machine alone, got {value!r}; export it with the model: "
                    f"imagine-flash export MODEL OUT --{name.replace('_', '-')}"
                )
        shared = {name: getattr(self, name) for name in ExecutionOptions.model_fields}
        return LoadOptions(**shared, loras=self.lora, max_waiting=self.max_queue)

    def load_engine(self) -> Engine:
        """Raises ArtifactError, MissingExtraError."""
        return Engine.load(self.model, self.loading)

    def check_model(self, *, here: bool = True) -> None:
        """What loading would find wrong in its first second; a hub id's files, which loading fetches, excepted. here: it is
        this machine that draws. Raises ImagineFlashError."""
        most = os.cpu_count() or 1
        if here and self.threads is not None and self.threads > most:
            raise RequestError(f"threads: must be 1 to {most}, the processors of this machine, got {self.threads}")
        check_loading(self.model, self.loading, here=here)


def read_settings(file: Path | None, given: Mapping[str, Any]) -> ServerSettings:
    """The settings of a YAML file, names as of the options, those that were `given` before them; with the keys of the key
    file. Raises RequestError."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            read = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        except yaml.YAMLError as error:
            raise RequestError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(read, dict):
            raise RequestError(f"{file} must hold names and values, such as 'max-queue: 64', got {type(read).__name__}")
        values = {str(name).replace("-", "_"): value for name, value in read.items()}
        try:
            ServerSettings(**values)
        except RequestError as error:
            raise RequestError(f"{file}: {error}") from None
    return ServerSettings(**{**values, **given}).with_keys()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file, one a line, a name after it if it has one; lines that begin with # are skipped. Raises RequestError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise RequestError(f"cannot read the keys in {path}: {reason}") from None
    given = [line.split(maxsplit=1) for line in lines if line.strip() and not line.strip().startswith("#")]
    if not given:
        raise RequestError(f"{path} holds no key; write one a line, such as the output of: openssl rand -hex 32")
    keys = []
    for number, (key, *name) in enumerate(given, 1):
        try:
            keys.append(ApiKey(key=key, name=name[0].strip() if name else ""))
        except RequestError as error:
            raise RequestError(f"key {number} of {path}: {error}") from None
    return tuple(keys)
