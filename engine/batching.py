"""Step-level batching: one thread draws all requests, and chunks at different steps of different plans share network calls.

A request joins at the next call, so a lone one never waits for company. Clients share the calls by weight (`fairness`); of one
client the earliest deadline goes first, and pictures that only need decoding go before everything. A prompt is encoded when its
first step is next. A request that was cancelled or has expired is dropped before the next call.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.errors import EngineError, ExpiredError
from ..folders.manifests import ModelDescription
from .backends.base import Backend
from .calls import Calls
from .conditioning import Conditioning
from .fairness import FairShare
from .prompt_cache import PromptCache
from .queue import CLOSED, Queue
from .work import Chunk, Job, by_job, rows_of


class Batcher:
    """Owns the backend: nothing else calls it once the thread runs. max_waiting: pictures accepted but not yet drawn; those of
    jobs with a reserved place do not count. whole: by whole-sampler graphs.

    counts: what has happened so far, by name; "batch N" are network calls with N pictures. failed_in_a_row: requests that
    a backend has failed since the last one that it drew.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: ModelDescription,
        cache: PromptCache,
        *,
        max_batch: int,
        max_waiting: int,
        whole: bool,
    ) -> None:
        self.backend, self.max_batch, self.whole = backend, max_batch, whole
        self.counts: Counter[str] = Counter()
        self.failed_in_a_row = 0
        self._queue, self._cache = Queue(max_waiting), cache
        self._share = FairShare()  # as all below, of the thread alone
        self._calls = Calls(backend, manifest, max_batch, self.counts)
        self._conditioning = Conditioning(backend, cache, manifest.guidance, is_controlled=manifest.control is not None)
        self._thread = threading.Thread(target=self._loop, name="imagine-flash", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pictures that were asked for and are not drawn yet."""
        return self._queue.rows

    def submit(self, chunks: list[Chunk]) -> None:
        """Takes up a job's chunks. Raises what `Queue.put` raises."""
        chunks[0].job.stopwatch = self.backend.stopwatch
        self._queue.put(chunks)

    @property
    def is_current_thread(self) -> bool:
        """Whether this is the thread that draws, in which futures call back."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Ends the thread after the call in progress, fails what waits, frees the backend. Waits for the thread."""
        if self._queue.was_forked:
            return
        self._queue.close()
        if not self.is_current_thread:
            self._thread.join()

    def _loop(self) -> None:
        try:
            while self._take_up():  # a call each: its names keep nothing of what was drawn while nothing is asked for
                pass
        finally:  # whatever ended it: nobody waits for a thread that is gone
            self._queue.close()
            self._queue.take()
            for chunk in self._queue.active:
                chunk.job.fail(EngineError(CLOSED))
            self._queue.keep(())
            self.backend.close()
            self._cache.clear()

    def _take_up(self) -> bool:
        """A turn, with what has arrived; False at the end."""
        clients = {chunk.job.client.name for chunk in self._queue.active}
        arrived, forgotten = self._queue.take()
        self.counts["cancelled"] += forgotten
        if self._queue.closed:
            return False
        try:
            for chunks in arrived:
                client = chunks[0].job.client.name
                self._share.arrive(client, is_waiting=client in clients)
                clients.add(client)
            self._turn()
        except Exception as error:  # a fault of ours must not leave anybody waiting
            self.failed_in_a_row += 1
            for job in by_job(self._queue.active):
                self._end(job, EngineError(f"the engine failed: {error!r}"))
        return True

    def _turn(self) -> None:
        """One call of the network or decoder, after what those that begin with it need."""
        self._drop_the_ended(self._queue.active)
        group = self._share.next_group(self._queue.active, self.max_batch, same_steps=self.whole)
        new = [chunk for chunk in group if chunk.turn is None]
        self._share.begin(new)
        if group and not group[0].is_drawn:
            self._guarded(self._calls.adapt, group)
        if new := self._still_active(new):
            self._begin(new)
            for chunk in new:
                chunk.job.future.begun = True
            self._drop_the_ended(self._still_active(group))  # the rest before its own turn
        group = self._still_active(group)
        if group:
            whole = self.whole or self._is_alone(group)
            work = self._sample if whole else self._decode if group[0].is_drawn else self._calls.denoise
            self._guarded(work, group)

    def _is_alone(self, group: Sequence[Chunk]) -> bool:
        """Whether this is one new picture with nobody beside it, whose whole plan the backend can draw in one call."""
        first = group[0]
        one = len(self._queue.active) == len(group) == first.rows == 1 and first.job.steps in self.backend.lone_plans
        return one and first.x is None and first.start is None and not first.against

    def _begin(self, new: Sequence[Chunk]) -> None:
        """What chunks need before their first step; prompts are encoded together, those in the cache not at all."""
        for own in by_job(new).values():
            if own[0].job.request.image is not None:
                self._guarded(self._calls.start_from_image, own)
            if self._conditioning.is_controlled:
                self._guarded(self._conditioning.read_picture, own)
        if self.whole and not self._calls.has_embedding_samplers(new):
            return
        if unknown := self._conditioning.unknown(new):
            self._guarded(self._conditioning.encode, unknown)
        if left := self._still_active(new):
            self._guarded(self._conditioning.give, left)

    def _decode(self, group: Sequence[Chunk]) -> None:
        self._deliver(group, *self._calls.decode(group))

    def _sample(self, group: Sequence[Chunk]) -> None:
        self._deliver(group, *self._calls.sample(group))

    def _deliver(
        self, group: Sequence[Chunk], images: NDArray[np.uint8], finite: NDArray[np.bool_], stage: str
    ) -> None:
        """Hands the pictures out; one that came of NaN or Inf is never delivered, however it looks: it fails the request that
        has it, no other."""
        delivered = set(group)
        self._queue.keep(chunk for chunk in self._queue.active if chunk not in delivered)
        drawn = list(zip(group, rows_of(group), strict=True))
        failed = dict.fromkeys(chunk.job for chunk, own in drawn if not finite[own].all())
        for chunk, own in drawn:
            if chunk.job not in failed:
                self.failed_in_a_row = 0
                self.counts["pictures"] += chunk.rows
                chunk.job.finish(chunk.row, images[own])
        for job in failed:  # once a request, however many of its pictures
            reason = f"{stage} gave NaN or Inf; load the engine with precision fp32, or export again"
            self.failed_in_a_row += 1
            self._end(job, EngineError(reason))

    def _guarded(self, work: Callable[[Sequence[Chunk]], None], group: Sequence[Chunk]) -> None:
        """A failing call is tried once more for each request alone, so that only the one to blame fails."""
        try:
            work(group)
        except Exception as error:
            jobs = by_job(group)
            if len(jobs) > 1:
                for own in jobs.values():
                    self._guarded(work, own)
                return
            self.failed_in_a_row += 1
            known = isinstance(error, EngineError)
            self._end(next(iter(jobs)), error if known else EngineError(f"{work.__name__.lstrip('_')}: {error}"))

    def _end(self, job: Job, error: EngineError) -> None:
        self.counts["failed"] += 1
        job.fail(error)
        self._queue.keep(chunk for chunk in self._queue.active if chunk.job is not job)

    def _still_active(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        active = set(self._queue.active)
        return [chunk for chunk in chunks if chunk in active]

    def _drop_the_ended(self, chunks: Sequence[Chunk]) -> None:
        """Of these, forgets cancelled jobs, and fails those whose deadline has passed."""
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.job.expires and chunk.job.deadline < now and not chunk.job.future.done():
                self.counts["expired"] += 1
                chunk.job.fail(ExpiredError(f"not drawn within its {chunk.job.request.timeout:g} s; try again later"))
        if gone := {chunk.job for chunk in chunks if chunk.job.future.done()}:
            self.counts["cancelled"] += sum(job.future.cancelled() for job in gone)
            self._queue.keep(chunk for chunk in self._queue.active if chunk.job not in gone)
