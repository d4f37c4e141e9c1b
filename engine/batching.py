"""Step-level batching: one thread draws all requests, and chunks at different steps of different plans share network calls.

A request joins at the next call, so a lone one never waits for company. The earliest deadline goes first, and pictures that
only need decoding go before everything. A request that was cancelled or has expired is dropped before the next call.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BusyError, EngineError, ExpiredError, RequestError
from ..folders.manifests import ModelDescription
from .backends import Array, Backend
from .editing import DEFAULT_STRENGTH, Start, first_step, latent_mask
from .prompt_cache import PromptCache
from .work import Chunk, Job, PlanTables

T = TypeVar("T")
CLOSED = "the engine is closed; load it again with Engine.load"


class Batcher:
    """Owns the backend: nothing else calls it once the thread runs. max_waiting: pictures accepted but not yet drawn.

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
        self.backend, self.cache, self.max_batch, self.max_waiting = backend, cache, max_batch, max_waiting
        self.counts: Counter[str] = Counter()
        self.failed_in_a_row = 0
        self._plans = {n: PlanTables.of(manifest.schedule, table) for n, table in manifest.update_tables().items()}
        self._downscale, self._last = manifest.downscale, manifest.schedule.num_train_timesteps - 1
        self._whole, self._graphs = whole, manifest.graph_names
        self._arrived: list[list[Chunk]] = []
        self._active: tuple[Chunk, ...] = ()  # replaced by the thread alone, and never changed: anybody may read it
        self._rows = 0  # of both
        self._forgotten = 0  # requests, since the last turn
        self._closed = False
        self._wake = threading.Condition()  # guards all of these
        self._thread = threading.Thread(target=self._loop, name="imagine-flash", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pictures that were asked for and are not drawn yet."""
        return self._rows

    def submit(self, chunks: list[Chunk]) -> None:
        """Takes up a job's chunks. Raises EngineError after `close`, BusyError where too much waits already, RequestError
        for more than may ever wait."""
        with self._wake:
            if self._closed:
                raise EngineError(CLOSED)
            rows = sum(chunk.rows for chunk in chunks)
            if rows > self.max_waiting:
                most = f"at most {self.max_waiting} may wait here; ask for fewer"
                raise RequestError(f"{rows} pictures at once, {most}", param="n")
            if self._rows + rows > self.max_waiting and (waiting := self._alive()) + rows > self.max_waiting:
                raise BusyError(f"{waiting} pictures wait already, at most {self.max_waiting} may; try again later")
            self._arrived.append(chunks)
            self._rows += rows
            self._wake.notify()

    def _alive(self) -> int:
        """Pictures that somebody still waits for. What was cancelled before its turn is forgotten: whoever types fast must
        not be kept out by their own older requests."""
        kept = [chunks for chunks in self._arrived if not chunks[0].job.future.cancelled()]
        self._forgotten += len(self._arrived) - len(kept)
        self._rows -= sum(c.rows for chunks in self._arrived for c in chunks) - sum(
            c.rows for chunks in kept for c in chunks
        )
        self._arrived = kept
        return self._rows - sum(chunk.rows for chunk in self._active if chunk.job.future.cancelled())

    def _keep(self, chunks: Iterable[Chunk]) -> None:
        """What is drawn from now on; the rest of it has left."""
        kept = tuple(chunks)
        with self._wake:
            self._rows -= sum(chunk.rows for chunk in self._active) - sum(chunk.rows for chunk in kept)
            self._active = kept

    def close(self) -> None:
        """Ends the thread after the call in progress, fails what waits, frees the backend. Waits for the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._arrived or self._active or self._closed)
                arrived, self._arrived = self._arrived, []
                self._active = tuple(
                    sorted((*self._active, *(c for chunks in arrived for c in chunks)), key=lambda c: c.job.deadline)
                )
                self.counts["cancelled"] += self._forgotten
                self._forgotten = 0
                closed = self._closed
            if closed:
                for chunk in self._active:
                    chunk.job.fail(EngineError(CLOSED))
                self._keep(())
                self.backend.close()
                return
            try:
                self._turn(arrived)
            except Exception as error:  # a fault of ours must not leave anybody waiting
                for job in dict.fromkeys(chunk.job for chunk in self._active):
                    self._end(job, EngineError(f"the engine failed: {error!r}"))

    def _turn(self, arrived: Sequence[list[Chunk]]) -> None:
        """One call of the network or decoder, after what newcomers need."""
        self._begin(arrived)
        self._drop_the_ended()
        if group := self._next_group():
            work = self._sample if self._whole else self._decode if self._is_drawn(group[0]) else self._denoise
            self._guarded(work, group)

    def _begin(self, arrived: Sequence[list[Chunk]]) -> None:
        """Takes up new jobs; their prompts are encoded together, those in the cache not at all."""
        self._drop_the_ended()
        new = [chunks for chunks in arrived if not chunks[0].job.future.done()]
        if self._whole and not self._has_embedding_samplers(new):
            return
        for chunks in new:
            if chunks[0].job.request.image is not None:
                self._guarded(self._start_from_image, chunks)
        unknown = [chunks for chunks in new if not self._recall(chunks)]
        for i in range(0, len(unknown), self.max_batch):
            self._guarded(self._encode, [chunk for chunks in unknown[i : i + self.max_batch] for chunk in chunks])

    def _has_embedding_samplers(self, new: Sequence[list[Chunk]]) -> bool:
        return "text_encoder" in self._graphs and all(
            f"sampler_{chunks[0].job.steps}_from_embeddings" in self._graphs for chunks in new
        )

    def _recall(self, chunks: list[Chunk]) -> bool:
        job = chunks[0].job
        found = self.cache.find(job.tokens)
        job.cached = found is not None
        if found is not None:
            self._condition(chunks, found)
        return job.cached

    def _condition(self, chunks: Sequence[Chunk], conditions: Sequence[Array]) -> None:
        for chunk in chunks:
            chunk.conditions = tuple(self.backend.join([one] * chunk.rows) for one in conditions)

    def _encode(self, group: Sequence[Chunk]) -> None:
        """One call for the prompts of several jobs."""
        jobs = list(dict.fromkeys(chunk.job for chunk in group))
        tokens = {name: np.concatenate([job.tokens[name] for job in jobs]) for name in jobs[0].tokens}
        conditions = _timed(jobs, "encode", lambda: self.backend.encode(tokens))
        for i, job in enumerate(jobs):
            own = self.cache.keep(job.tokens, tuple(condition[i : i + 1] for condition in conditions))
            self._condition([chunk for chunk in group if chunk.job is job], own)

    def _start_from_image(self, chunks: Sequence[Chunk]) -> None:
        """The picture as latents, noised to the level of the step where drawing begins."""
        job = chunks[0].job
        request, plan = job.request, self._plans[job.steps]
        assert request.image is not None
        image = request.image[None]
        latents = _timed([job], "encode", lambda: self.backend.encode_image(image))
        mask = None if request.mask is None else self.backend.upload(latent_mask(request.mask, self._downscale))
        strength = request.strength or (DEFAULT_STRENGTH if mask is None else 1.0)
        for chunk in chunks:
            chunk.start, chunk.step = Start(latents, mask), first_step(plan.timesteps, self._last, strength)
            if strength < 1:
                chunk.x = chunk.start.at(self.backend.upload(chunk.noise), *plan.levels[chunk.step])

    def _next_group(self) -> list[Chunk]:
        """The chunks of the next call: those that go with the first, as many as fit."""
        ready = [chunk for chunk in self._active if self._is_drawn(chunk)] or list(self._active)
        group: list[Chunk] = []
        for chunk in ready:
            together = not group or (
                chunk.job.size == group[0].job.size and (not self._whole or chunk.job.steps == group[0].job.steps)
            )
            if together and sum(c.rows for c in group) + chunk.rows <= self.max_batch:
                group.append(chunk)
        return group

    def _is_drawn(self, chunk: Chunk) -> bool:
        return not self._whole and chunk.step == len(self._plans[chunk.job.steps].times)

    def _denoise(self, group: Sequence[Chunk]) -> None:
        """One network call and update; every chunk is a step further."""
        jobs = list(dict.fromkeys(chunk.job for chunk in group))
        join = self.backend.join
        x, conditions = _timed(
            jobs,
            "copy",
            lambda: (
                join([self._latents(chunk) for chunk in group]),
                tuple(map(join, zip(*(chunk.conditions for chunk in group), strict=True))),
            ),
        )
        times, a, b = (self._column(group, name) for name in ("times", "a", "b"))
        m = _timed(jobs, "denoise", lambda: self.backend.denoise(x, times, conditions))
        x = _timed(jobs, "update", lambda: self.backend.update(x, m, a, b))
        parts, start = [], 0
        for chunk in group:  # nothing is committed before all is computed: a failing call is tried again
            part = x if len(group) == 1 else x[start : start + chunk.rows]
            if chunk.start is not None:
                plan, noise = self._plans[chunk.job.steps], self.backend.upload(chunk.noise)
                part = chunk.start.kept(part, noise, *plan.levels[chunk.step + 1])
            parts.append(part)
            start += chunk.rows
        self.counts[f"batch {len(times)}"] += 1
        for chunk, part in zip(group, parts, strict=True):
            chunk.x, chunk.step = part, chunk.step + 1

    def _column(self, group: Sequence[Chunk], name: str) -> NDArray[np.float32]:
        """One value per image: that of its plan at its step."""
        values = [getattr(self._plans[chunk.job.steps], name)[chunk.step] for chunk in group]
        return np.concatenate([np.full(c.rows, value, np.float32) for c, value in zip(group, values, strict=True)])

    def _latents(self, chunk: Chunk) -> Array:
        return self.backend.upload(chunk.noise) if chunk.x is None else chunk.x

    def _decode(self, group: Sequence[Chunk]) -> None:
        """Pictures of all chunks in one call; the active list loses them. NaN fails the request that has it, no other."""
        jobs = list(dict.fromkeys(chunk.job for chunk in group))
        x = _timed(jobs, "copy", lambda: self.backend.join([chunk.x for chunk in group]))
        images, finite = _timed(jobs, "decode", lambda: self.backend.decode(x))
        stage = "decode" if finite.all() or self.backend.finite(x)[~finite].any() else "denoise"
        self._deliver(group, images, finite, stage)

    def _sample(self, group: Sequence[Chunk]) -> None:
        """Whole-sampler graphs: everything in one call."""
        jobs = list(dict.fromkeys(chunk.job for chunk in group))
        name, join = f"sampler_{jobs[0].steps}", self.backend.join
        if group[0].conditions:
            name += "_from_embeddings"
            inputs = [join(parts) for parts in zip(*(chunk.conditions for chunk in group), strict=True)]
        else:
            keys = jobs[0].tokens
            inputs = [np.concatenate([chunk.job.tokens[key].repeat(chunk.rows, 0) for chunk in group]) for key in keys]
        noise = join([self.backend.upload(chunk.noise) for chunk in group])
        images, finite = _timed(jobs, "sampler", lambda: self.backend.sample(name, inputs, noise))
        self.counts[f"batch {len(noise)}"] += 1
        self._deliver(group, images, finite, "sampler")

    def _deliver(
        self, group: Sequence[Chunk], images: NDArray[np.uint8], finite: NDArray[np.bool_], stage: str
    ) -> None:
        """Hands the pictures out; one that came of NaN or Inf is never delivered, however it looks."""
        self._keep(chunk for chunk in self._active if chunk not in group)
        start, drawn, failed = 0, [], set[Job]()
        for chunk in group:
            own = slice(start, start + chunk.rows)
            start = own.stop
            drawn.append((chunk, images[own]))
            if not finite[own].all():
                failed.add(chunk.job)
        for chunk, pictures in drawn:
            if chunk.job not in failed:
                self.failed_in_a_row = 0
                self.counts["pictures"] += chunk.rows
                chunk.job.finish(chunk.row, pictures)
        for job in failed:  # once a request, however many of its pictures
            reason = f"{stage} gave NaN or Inf; load the engine with precision fp32, or export again"
            self.failed_in_a_row += 1
            self._end(job, EngineError(reason))

    def _guarded(self, work: Callable[[Sequence[Chunk]], None], group: Sequence[Chunk]) -> None:
        """A failing call is tried once more for each request alone, so that only the one to blame fails."""
        try:
            work(group)
        except Exception as error:
            jobs = list(dict.fromkeys(chunk.job for chunk in group))
            if len(jobs) > 1:
                for job in jobs:
                    self._guarded(work, [chunk for chunk in group if chunk.job is job])
                return
            self.failed_in_a_row += 1
            self._end(
                jobs[0], error if isinstance(error, EngineError) else EngineError(f"{work.__name__[1:]}: {error}")
            )

    def _end(self, job: Job, error: EngineError) -> None:
        self.counts["failed"] += 1
        job.fail(error)
        self._keep(chunk for chunk in self._active if chunk.job is not job)

    def _drop_the_ended(self) -> None:
        """Forgets cancelled jobs, and fails those whose deadline has passed."""
        now = time.perf_counter()
        for chunk in self._active:
            if chunk.job.expires and chunk.job.deadline < now and not chunk.job.future.done():
                self.counts["expired"] += 1
                chunk.job.fail(ExpiredError(f"not drawn within its {chunk.job.request.timeout:g} s; try again later"))
        gone = {chunk.job for chunk in self._active if chunk.job.future.done()}
        self.counts["cancelled"] += sum(job.future.cancelled() for job in gone)
        self._keep(chunk for chunk in self._active if chunk.job not in gone)


def _timed(jobs: Sequence[Job], stage: str, work: Callable[[], T]) -> T:
    started = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - started
    for job in jobs:
        job.spent(stage, seconds)
    return value
