"""Who asks: by their key, or without keys by their address; and how much they may have."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Generic, Self, TypeVar

from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.types import Scope

from ...core.errors import BusyError, RequestError
from ..work import Client
from .settings import ServerSettings

T = TypeVar("T")
SOONEST = 1.0  # seconds after which a client may try again: what is being drawn may be given back
KEY_PROTOCOL = "imagine-flash.key."  # a WebSocket of a browser has no other header to put the key into


class QuotaError(BusyError):
    """A client has had the pictures of its quota. after: seconds until there are more."""

    def __init__(self, message: str, after: float) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class KnownClient(Client):
    """One that was let in. label: the name of its key, in the log and in metrics; "" without keys."""

    label: str = ""
    quotas: tuple[RateLimitItem, ...] = ()


class Clients:
    """Those of one server."""

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = settings.api_keys
        self._quota = settings.quota
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._reserved: Counter[str] = Counter()  # pictures that are being drawn, by the client's name

    def identify(self, scope: Scope, headers: Mapping[str, str]) -> KnownClient | None:
        """None where a key is wanted and none is given; the names of the headers in lower case."""
        if not self._keys:
            return KnownClient(_network((scope.get("client") or ("",))[0]), quotas=_parsed(self._quota))
        given = _given_key(headers).encode()
        same = [
            hmac.compare_digest(given, key.key.encode()) for key in self._keys
        ]  # all of them: the time says nothing
        if True not in same:
            return None
        number = same.index(True)
        key = self._keys[number]
        name = key.name or f"key {number + 1}"
        return KnownClient(name, key.weight, name, _parsed(key.quota or self._quota))

    def reserve(self, client: KnownClient, pictures: int) -> Reservation:
        """Before they are drawn. Raises QuotaError where a client may not have so many now, RequestError where never."""
        reserved = self._reserved[client.name]
        for quota in client.quotas:
            if pictures > quota.amount:
                message = (
                    f"{pictures} pictures are more than the whole quota of {quota}; ask for at most {quota.amount}"
                )
                raise RequestError(message, param="n")
            if not self._limiter.test(quota, client.name, cost=reserved + pictures):
                reset, left = self._limiter.get_window_stats(quota, client.name)
                left = max(0, left - reserved)
                message = f"the quota of {quota} pictures has {left} left, {pictures} were asked for; try again later"
                raise QuotaError(message, max(SOONEST, reset - time.time()))
        self._reserved[client.name] += pictures
        return Reservation(self, client, pictures)

    def settle(self, client: KnownClient, reserved: int, drawn: int) -> None:
        """Ends a reservation, of which so many were drawn."""
        self._reserved[client.name] -= reserved
        if not self._reserved[client.name]:
            del self._reserved[client.name]
        for quota in client.quotas if drawn else ():
            self._limiter.hit(quota, client.name, cost=drawn)


class Reservation:
    """Pictures that a client's quota holds while they are drawn; those that were not are given back at the end of the context."""

    def __init__(self, clients: Clients, client: KnownClient, pictures: int) -> None:
        self._clients, self._client, self.pictures = clients, client, pictures

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def count(self) -> None:
        """They were drawn."""
        self._settle(self.pictures)

    def give_back(self) -> None:
        """They will not be drawn; nothing, once they were counted."""
        self._settle(0)

    def _settle(self, drawn: int) -> None:
        self._clients.settle(self._client, self.pictures, drawn)
        self.pictures = 0


class StreamPlaces(Generic[T]):
    """Of streams that are open at once. Where all are taken, a client that has less than its share of them gets that of the newest
    stream of the client that has most: nobody keeps others out, and who was here first stays."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: dict[T, str] = {}  # by stream its client, the oldest first

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def full(self) -> str:
        """Why there is none, in words that the page knows."""
        return f"{len(self)} streams are open, at most {self._most} may be"

    def take(self, stream: T, client: str) -> T | None:
        """A place; the stream that lost its own, where there was no other. Raises BusyError."""
        lost = None
        if len(self) >= self._most:
            open_of = Counter(self._taken.values())
            if open_of[client] >= self._most // len({*open_of, client}):
                raise BusyError(self.full)
            ((greediest, _),) = open_of.most_common(1)
            lost = next(one for one in reversed(self._taken) if self._taken[one] == greediest)
            del self._taken[lost]
        self._taken[stream] = client
        return lost

    def leave(self, stream: T) -> None:
        """Nothing, where it was lost before."""
        self._taken.pop(stream, None)


def _given_key(headers: Mapping[str, str]) -> str:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() == "basic":  # as /sdapi's clients know it: any name, the key as the password
        with suppress(ValueError):
            return base64.b64decode(given, validate=True).decode().partition(":")[2]
    offered = [part.strip() for part in headers.get("sec-websocket-protocol", "").split(",")]
    return next((part.removeprefix(KEY_PROTOCOL) for part in offered if part.startswith(KEY_PROTOCOL)), "")


@cache
def _parsed(quota: str | None) -> tuple[RateLimitItem, ...]:
    return tuple(parse_many(quota)) if quota else ()


def _network(address: str) -> str:
    """An address, of IPv6 the network that one customer has; a socket for both kinds has those of IPv4 as ::ffff:192.0.2.1."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
