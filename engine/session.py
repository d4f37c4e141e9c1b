"""Typing: of one user's requests only the newest matters, and its picture is never replaced by an older one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from ..core.errors import EngineError, ImagineFlashError, RequestError
from .engine import Engine
from .request import GenerateRequest
from .work import Client, Drawing, GenerateResult, Prepared


@dataclass(frozen=True, kw_only=True)
class SessionResult:
    """What came of request number `seq`: pictures, or an error. preview: in one step, and more steps follow. label: what
    `submit` was given."""

    seq: int
    label: object = None
    result: GenerateResult | None = None
    error: ImagineFlashError | None = None
    preview: bool = False


class Session:
    """Latest wins: at most one request runs and one waits. A newer one takes the place of the one that waits and cancels the
    one that runs before its next call (encode | step | decode). Sequence numbers of results never go backwards.

    A session has one place in the engine's queue for as long as it is open, so its newest request is never refused as too much;
    where more sessions are open than the engine can draw, each is shown fewer pictures, and its last request is always drawn.

    deliver: called with each result, in the engine's thread, so it must be quick. preview: each request is drawn in one
    step first, and in its own number of steps, from the same noise, if nothing newer came meanwhile. let_finish_after: seconds
    after which a request that runs is let finish beside the newest one, since somebody who types faster than the engine
    draws would see nothing until they stop; None cancels always. client: whose share of the engine it takes.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[SessionResult], None],
        *,
        preview: bool = False,
        let_finish_after: float | None = None,
        client: Client | None = None,
    ) -> None:
        self.engine, self.preview, self.let_finish_after, self.client = engine, preview, let_finish_after, client
        self.replaced = 0  # requests that a newer one made obsolete
        self.newest = 0  # the highest number so far
        self._deliver = deliver
        self._lock = threading.RLock()  # a future that is cancelled calls back at once
        self._future: Drawing | None = None  # of the newest, until it is delivered
        self._finishing: Drawing | None = None  # of an older one that may finish
        self._delivered = 0  # the number of the last result
        self._unanswered: float | None = None  # since when, perf_counter
        self._closed = False

    def __repr__(self) -> str:
        return f"<Session {'closed' if self._closed else 'open'}, newest request {self.newest}>"

    def submit(
        self,
        request: GenerateRequest | str | None = None,
        seq: int | None = None,
        *,
        preview: bool | None = None,
        label: object = None,
        **fields: Any,
    ) -> int:
        """The newest request, or its prompt and other fields by name; returns its number, which is one more than the last
        unless given. preview: by default the session's. label: comes back with the results.

        Raises RequestError and the like for what the engine does not draw and for a number that is not newer, EngineError
        after `close`; the request before stays. Of several threads' requests without a number, the one that is ready last is
        the newest.
        """
        with self._lock:
            self._next(seq)
        prepared = self.engine.prepare(
            GenerateRequest.of(request, fields)
        )  # in the caller's thread; the engine's may need the lock meanwhile
        wants_preview = self.preview if preview is None else preview
        first = self.engine.preview(prepared) if wants_preview else None
        with self._lock:
            seq = self._next(seq)  # something newer may have come, or the end
            future = self._start(first or prepared, since=self._unanswered)
            self._cancel_older()
            self.newest, self._future = seq, future
        follower = prepared if first else None
        future.add_done_callback(lambda done: self._arrived(seq, label, follower, done))
        return seq

    def close(self) -> None:
        """Cancel what runs or waits; nothing is delivered afterwards."""
        with self._lock:
            self._closed = True
            for future in (self._future, self._finishing):
                if future is not None:
                    future.cancel()
            self._future = self._finishing = None

    def _next(self, seq: int | None) -> int:
        """The number of a request that begins now. Raises RequestError, EngineError."""
        if self._closed:
            raise EngineError("the session is closed; open another")
        seq = self.newest + 1 if seq is None else seq
        if seq <= self.newest:
            raise RequestError(f"seq must be above {self.newest}, the newest so far, got {seq}", param="seq")
        return seq

    def _start(self, prepared: Prepared, *, since: float | None = None) -> Drawing:
        return self.engine.start(prepared, client=self.client, reserved=True, since=since)

    def _cancel_older(self) -> None:
        """For a newer request: cancels the newest so far, or spares it where nothing was delivered for too long."""
        now = time.perf_counter()
        self._unanswered = now if self._unanswered is None else self._unanswered
        late = self.let_finish_after is not None and now - self._unanswered > self.let_finish_after
        if (
            late
            and self._finishing is None
            and self._future is not None
            and self._future.begun
            and not self._future.done()
        ):
            self._finishing = self._future
        elif self._future is not None:
            self.replaced += self._future.cancel()

    def _arrived(self, seq: int, label: object, follower: Prepared | None, future: Future[GenerateResult]) -> None:
        """Delivers what came of a request; `follower` is what comes after a preview."""
        with self._lock:
            finishing = future is self._finishing
            if finishing:
                self._finishing = None
            if self._closed or seq < self._delivered or not (finishing or future is self._future):
                return  # obsolete, or cancelled
            if not finishing:
                self._future = None
            try:
                found = SessionResult(seq=seq, label=label, result=future.result(), preview=follower is not None)
            except CancelledError:
                return
            except ImagineFlashError as error:
                found, follower = SessionResult(seq=seq, label=label, error=error), None
            following = refusal = None
            if follower is not None and not finishing:
                try:  # before the preview is delivered, since its reader may answer with something newer
                    following = self._future = self._start(follower)
                except ImagineFlashError as error:
                    refusal = error
            self._delivered, self._unanswered = seq, None
            try:
                self._deliver(found)
                if refusal is not None and self.newest == seq:
                    self._deliver(SessionResult(seq=seq, label=label, error=refusal))
            finally:  # whatever `deliver` raises
                if following is not None:
                    following.add_done_callback(lambda done: self._arrived(seq, label, None, done))


class Mailbox:
    """The newest result of a session for a reader in an event loop; a slow reader misses results, and nothing piles up.

    mailbox = Mailbox()
    session = Session(engine, mailbox.put)
    async for found in mailbox: ...
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._latest: SessionResult | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.skipped = 0  # results that a newer one replaced before they were read

    def put(self, found: SessionResult) -> None:
        """From any thread."""
        with self._lock:
            self.skipped += self._latest is not None
            self._latest = found
        self._call(self._arrived.set)

    def close(self) -> None:
        """Ends the reading; from any thread."""
        self._closed = True
        self._call(self._arrived.set)

    async def __aiter__(self) -> AsyncIterator[SessionResult]:
        while not self._closed:
            await self._arrived.wait()
            self._arrived.clear()
            with self._lock:
                found, self._latest = self._latest, None
            if found is not None and not self._closed:
                yield found
            del found  # not kept until the next one comes

    def _call(self, what: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what)
