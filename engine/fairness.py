"""Whose turn it is: clients share the network by weight, not by how much they ask for.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): time is counted in rows of network calls, and who has had least of
them goes first. Chunks of one client go by deadline. A client that was away has saved nothing up.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .work import Chunk

COMPANY_LASTS = 2.0  # seconds after its last request that a client counts as being there
KEPT = 4096  # clients whose share is remembered


@dataclass
class _Share:
    """What a client has had, in rows of network calls by weight, and when it last asked."""

    used: float = 0.0
    asked: float = 0.0


class FairShare:
    """The order of the chunks that wait; called by one thread at a time."""

    def __init__(self) -> None:
        self._now = 0.0  # the start of the work in progress, in rows by weight
        self._shares: dict[str, _Share] = {}

    def arrive(self, client: str, *, is_waiting: bool) -> None:
        """A client asks. is_waiting: it has other work here, and so keeps its turn."""
        share = self._shares.setdefault(client, _Share())
        if not is_waiting:
            share.used = max(share.used, self._now)
        share.asked = time.perf_counter()
        if len(self._shares) > KEPT:
            self._shares = {name: share for name, share in self._shares.items() if share.used > self._now}

    def has_company(self, waiting: Collection[str]) -> bool:
        """Whether there is more than one client: of those that have work here, and those that asked lately."""
        recent = time.perf_counter() - COMPANY_LASTS
        return len({*waiting, *(name for name, share in self._shares.items() if share.asked > recent)}) > 1

    def ordered(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Those that have begun keep their turn; what waits gets turns by its client's share, in the order of
        deadlines. Of several whose turn it is, the smaller request goes first."""
        turns: dict[int, float] = {}
        by_deadline = sorted(chunks, key=lambda chunk: chunk.job.rank)
        used = {}
        for chunk in by_deadline:
            name = chunk.job.client.name
            if chunk.turn is None:
                share = self._shares.get(name)
                used[name] = used.get(name, share.used if share else self._now) + chunk.cost
            turns[id(chunk)] = used[name] if chunk.turn is None else chunk.turn
        return sorted(by_deadline, key=lambda chunk: (turns[id(chunk)], chunk.job.request.count))

    def begin(self, group: Sequence[Chunk]) -> None:
        """These are drawn now; those that begin are charged to their clients."""
        for name, chunks in groupby(group, key=lambda chunk: chunk.job.client.name):
            share = self._shares.setdefault(name, _Share(self._now))
            for chunk in chunks:
                if chunk.turn is None:
                    self._now = max(self._now, share.used)
                    share.used += chunk.cost
                    chunk.turn = share.used
