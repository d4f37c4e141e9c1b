"""Whose turn it is: clients share the network by weight, not by how much they ask for.

Weighted fair queueing (Demers, Keshav and Shenker, SIGCOMM 1989): time is counted in rows of network calls, and who has had least
of them goes first. Chunks of one client go by deadline. A client that was away has saved nothing up: it begins at the share that
everybody has had by then, which grows with what is drawn, so that ever new clients do not keep those out who were here before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .tokenizer import rows_of_prompt
from .work import Chunk

ACTIVE_SECONDS = 2.0  # seconds after its last request that a client counts as being there
KEPT = 4096  # clients whose share is remembered


@dataclass
class _Share:
    """What a client has had, in rows of network calls by weight, and when it last asked."""

    used: float = 0.0
    asked: float = 0.0


class FairShare:
    """The order of the chunks that wait; called by one thread at a time."""

    def __init__(self) -> None:
        self._now = 0.0  # what who was always here has had when the call in progress began, in rows by weight
        self._then = 0.0  # the same when it ends
        self._shares: dict[str, _Share] = {}  # in the order in which they asked last

    def arrive(self, client: str, *, is_waiting: bool) -> None:
        """A client asks. is_waiting: it has other work here, and so keeps its turn."""
        share = self._shares[client] = self._shares.pop(client, None) or _Share()
        if not is_waiting:
            share.used = max(share.used, self._now)
        share.asked = time.perf_counter()
        if len(self._shares) > KEPT:
            del self._shares[next(iter(self._shares))]

    def next_group(self, active: Iterable[Chunk], max_batch: int, *, same_steps: bool) -> list[Chunk]:
        """The chunks of the next call: those that go with the first, as many as fit; with other clients about, no client
        takes all of it, since they would wait the longer for the next. same_steps: only chunks of one plan share a call."""
        self._now = max(self._now, self._then)
        waiting = self.ordered(active)
        clients, most = {chunk.job.client.name: chunk.job.client.weight for chunk in waiting}, max_batch
        here = self.present(clients)
        if company := len(here) > 1:
            most = max(1, most // max(4, len(clients)))
        else:
            waiting = [chunk for chunk in waiting if chunk.is_drawn] or waiting
        group: list[Chunk] = []
        rows, own = 0, Counter[str]()

        def joins(chunk: Chunk) -> bool:
            return _go_together(chunk, group[0], same_steps, company and max_batch)

        def fill(chunks: Iterable[Chunk], share: int) -> None:
            nonlocal rows
            for chunk in chunks:
                if rows >= max_batch:
                    return
                client = chunk.job.client.name
                asked = chunk.rows if chunk.is_drawn else chunk.network_rows
                fits = rows + asked <= max_batch and (own[client] + asked <= share or not own[client])
                if not group or (fits and joins(chunk)):
                    group.append(chunk)
                    rows += asked
                    own[client] += asked

        fill(waiting, most)
        if company:
            taken = set(group)
            left = [chunk for chunk in waiting if chunk not in taken and joins(chunk)]
            wanting = {chunk.job.client.name for chunk in left}
            if wanting == here:  # all want more of this call: nobody waits for a short one
                fill(left, max_batch)
        if group and not group[0].is_drawn:
            self._then = self._now + sum(chunk.network_rows for chunk in group) / sum(clients.values())
        return group

    def present(self, waiting: Collection[str]) -> set[str]:
        """The clients that have work here, and those that asked lately."""
        recent, here = time.perf_counter() - ACTIVE_SECONDS, set(waiting)
        for name, share in reversed(self._shares.items()):  # the last to ask first
            if share.asked <= recent:
                break
            here.add(name)
        return here

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
            share = self._shares.setdefault(name, _Share(self._now, time.perf_counter()))
            for chunk in chunks:
                if chunk.turn is None:
                    self._now = max(self._now, share.used)
                    share.used += chunk.cost
                    chunk.turn = share.used


def _go_together(one: Chunk, other: Chunk, same_steps: bool, large: int) -> bool:
    """Whether two may share a call; of the denoiser, where they are drawn with the same LoRAs. large: with other clients about,
    the pictures of a request of more than so many do not ride in the calls of small ones, which they make longer; 0: there
    are none."""
    return (
        one.job.size == other.job.size
        and one.is_drawn == other.is_drawn
        and (one.is_drawn or one.job.loras == other.job.loras)
        and (one.is_drawn or rows_of_prompt(one.job.tokens) == rows_of_prompt(other.job.tokens))
        and (not same_steps or one.job.steps == other.job.steps)
        and (not large or (one.job.request.count > large) == (other.job.request.count > large))
    )
