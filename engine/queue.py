"""What was accepted and is not drawn yet: a bounded number of places, of which each client may have a share."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable

from ..core.errors import BusyError, EngineError, RequestError
from .work import Chunk

CLOSED = "the engine is closed; load it again with Engine.load"
FORKED = "this process was forked after the engine was loaded, and has not its thread: load it here, or spawn processes"


class Queue:
    """Chunks that have arrived and those that are being drawn. Any thread puts, one takes and keeps.

    max_waiting: pictures accepted but not yet drawn; those of jobs with a reserved place do not count. active: what is being
    drawn; replaced by the thread that takes alone, and never changed: anybody may read it.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.active: tuple[Chunk, ...] = ()
        self.closed = False
        self._arrived: list[list[Chunk]] = []
        self._rows = 0  # of both
        self._waiting = Counter[str]()  # of these, by client, without those that have a reserved place
        self._forgotten = 0  # requests, since `take`
        self._wake = threading.Condition()  # guards all of these
        self._process = os.getpid()

    @property
    def rows(self) -> int:
        """Pictures that were asked for and are not drawn yet, but for those whose places others may have: of cancelled requests
        that are being drawn."""
        if self.was_forked:
            return self._rows
        with self._wake:
            return self._rows - self._given_up().total()

    @property
    def was_forked(self) -> bool:
        """Whether this is a copy in a process that was forked, where there is no thread, and locks may be held for ever."""
        return os.getpid() != self._process

    def put(self, chunks: list[Chunk]) -> None:
        """Accepts a job's chunks. Raises EngineError after `close`; where the job has no reserved place, BusyError where too
        much waits already, RequestError for more than may ever wait."""
        if self.was_forked:
            raise EngineError(FORKED)
        with self._wake:
            if self.closed:
                raise EngineError(CLOSED)
            if not chunks[0].job.reserved:
                self._admit(chunks[0].job.client.name, sum(chunk.rows for chunk in chunks))
            self._count(chunks)
            self._arrived.append(chunks)
            self._wake.notify()

    def take(self) -> tuple[list[list[Chunk]], int]:
        """Waits until there is something to do. What has arrived, by job, which is active now; and how many requests were
        forgotten before their turn, because they were cancelled and their places needed."""
        with self._wake:
            self._wake.wait_for(lambda: self._arrived or self.active or self.closed)
            arrived, self._arrived = self._arrived, []
            forgotten, self._forgotten = self._forgotten, 0
            self.active = (*self.active, *(chunk for chunks in arrived for chunk in chunks))
        return arrived, forgotten

    def keep(self, chunks: Iterable[Chunk]) -> None:
        """What is drawn from now on, of what is active; the rest of it has left."""
        kept = tuple(chunks)
        still = set(kept)
        left = [chunk for chunk in self.active if chunk not in still]
        with self._wake:
            self._count(left, -1)
            self.active = kept

    def close(self) -> None:
        """Nothing is accepted any more, and whoever waits in `take` goes on."""
        with self._wake:
            self.closed = True
            self._wake.notify()

    def _admit(self, client: str, rows: int) -> None:
        """Where all places are taken, a client may still have its share of them: nobody keeps others out."""
        if rows > self.max_waiting:
            most = f"at most {self.max_waiting} may wait here; ask for fewer"
            raise RequestError(f"{rows} pictures at once, {most}", param="n")
        if self._waiting.total() + rows > self.max_waiting:
            self._forget_cancelled()
            waiting = self._waiting - self._given_up()
            share = self.max_waiting // len({*waiting, client})
            if waiting.total() + rows > self.max_waiting and waiting[client] + rows > share:
                raise BusyError(
                    f"{waiting.total()} pictures wait already, at most {self.max_waiting} may; try again later"
                )

    def _given_up(self) -> Counter[str]:
        """Of what is being drawn, the pictures that nobody wants any more, by client."""
        return _rows_by_client(chunk for chunk in self.active if chunk.job.is_cancelled)

    def _forget_cancelled(self) -> None:
        """Of what has not had its turn: whoever types fast must not be kept out by their own older requests."""
        for chunks in [chunks for chunks in self._arrived if chunks[0].job.is_cancelled]:
            self._arrived.remove(chunks)
            self._count(chunks, -1)
            self._forgotten += 1

    def _count(self, chunks: Collection[Chunk], sign: int = 1) -> None:
        self._rows += sign * sum(chunk.rows for chunk in chunks)
        for client, rows in _rows_by_client(chunks).items():
            self._waiting[client] += sign * rows
            if not self._waiting[client]:
                del self._waiting[client]


def _rows_by_client(chunks: Iterable[Chunk]) -> Counter[str]:
    found = Counter[str]()
    for chunk in chunks:
        if not chunk.job.reserved:
            found[chunk.job.client.name] += chunk.rows
    return found
