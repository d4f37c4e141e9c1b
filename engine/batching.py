"""Step-level batching: one thread draws all requests, and chunks at different steps of different plans share network calls.

A request joins at the next call, so a lone one never waits for company. Clients share the calls by weight (`fairness`); of one
client the earliest deadline goes first, and pictures that only need decoding go before everything. A prompt is encoded when its
first step is next. A request that was cancelled or has expired is dropped before the next call.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BusyError, EngineError, ExpiredError, RequestError
from ..folders.manifests import ModelDescription
from .backends.base import Array, Backend
from .editing import DEFAULT_STRENGTH, Start, first_step, latent_mask
from .fairness import FairShare
from .prompt_cache import PromptCache
from .tokenizer import Tokens
from .work import Chunk, Job, PlanTables

T = TypeVar("T")
CLOSED = "the engine is closed; load it again with Engine.load"
FORKED = "this process was forked after the engine was loaded, and has not its thread: load it here, or spawn processes"


class Batcher:
    """Owns the backend: nothing else calls it once the thread runs. max_waiting: pictures accepted but not yet drawn; those of
    jobs with a reserved place do not count.

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
        self._is_told, self._empty_is_zero = manifest.guidance.embedded, manifest.guidance.empty_is_zero
        self._arrived: list[list[Chunk]] = []
        self._active: tuple[Chunk, ...] = ()  # replaced by the thread alone, and never changed: anybody may read it
        self._rows = 0  # of both
        self._waiting = Counter[str]()  # of these, by client, without those that have a reserved place
        self._forgotten = 0  # requests, since the last turn
        self._closed = False
        self._wake = threading.Condition()  # guards all of these
        self._share = FairShare()  # of the thread alone
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._loop, name="imagine-flash", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pictures that were asked for and are not drawn yet."""
        return self._rows

    def submit(self, chunks: list[Chunk]) -> None:
        """Takes up a job's chunks. Raises EngineError after `close`; where the job has no reserved place, BusyError where too
        much waits already, RequestError for more than may ever wait."""
        if self._was_forked:
            raise EngineError(FORKED)
        with self._wake:
            if self._closed:
                raise EngineError(CLOSED)
            if not chunks[0].job.reserved:
                self._admit(chunks[0].job.client.name, sum(chunk.rows for chunk in chunks))
            chunks[0].job.stopwatch = self.backend.stopwatch
            self._arrived.append(chunks)
            self._count(chunks)
            self._wake.notify()

    @property
    def _was_forked(self) -> bool:
        """Whether this is a copy in a process that was forked, where there is no thread, and locks may be held for ever."""
        return os.getpid() != self._process

    def _admit(self, client: str, rows: int) -> None:
        """Where all places are taken, a client may still have its share of them: nobody keeps others out."""
        if rows > self.max_waiting:
            most = f"at most {self.max_waiting} may wait here; ask for fewer"
            raise RequestError(f"{rows} pictures at once, {most}", param="n")
        if self._waiting.total() + rows > self.max_waiting:
            self._forget_cancelled()
            waiting = self._waiting - self._rows_by_client(c for c in self._active if c.job.is_cancelled)
            share = self.max_waiting // len({*waiting, client})
            if waiting.total() + rows > self.max_waiting and waiting[client] + rows > share:
                raise BusyError(
                    f"{waiting.total()} pictures wait already, at most {self.max_waiting} may; try again later"
                )

    @staticmethod
    def _rows_by_client(chunks: Iterable[Chunk]) -> Counter[str]:
        found = Counter[str]()
        for chunk in chunks:
            if not chunk.job.reserved:
                found[chunk.job.client.name] += chunk.rows
        return found

    def _count(self, chunks: Collection[Chunk], sign: int = 1) -> None:
        self._rows += sign * sum(chunk.rows for chunk in chunks)
        for client, rows in self._rows_by_client(chunks).items():
            self._waiting[client] += sign * rows
            if not self._waiting[client]:
                del self._waiting[client]

    def _forget_cancelled(self) -> None:
        """Of what has not had its turn: whoever types fast must not be kept out by their own older requests."""
        for chunks in [chunks for chunks in self._arrived if chunks[0].job.is_cancelled]:
            self._arrived.remove(chunks)
            self._count(chunks, -1)
            self._forgotten += 1

    def _keep(self, chunks: Iterable[Chunk]) -> None:
        """What is drawn from now on; the rest of it has left."""
        kept = tuple(chunks)
        with self._wake:
            self._count(self._active, -1)
            self._count(kept)
            self._active = kept

    def close(self) -> None:
        """Ends the thread after the call in progress, fails what waits, frees the backend. Waits for the thread."""
        if self._was_forked:
            return
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
                clients = {chunk.job.client.name for chunk in self._active}
                self._active = (*self._active, *(chunk for chunks in arrived for chunk in chunks))
                self.counts["cancelled"] += self._forgotten
                self._forgotten = 0
                closed = self._closed
            if closed:
                for chunk in self._active:
                    chunk.job.fail(EngineError(CLOSED))
                self._keep(())
                self.backend.close()
                return
            for chunks in arrived:
                client = chunks[0].job.client.name
                self._share.arrive(client, is_waiting=client in clients)
                clients.add(client)
            try:
                self._turn()
            except Exception as error:  # a fault of ours must not leave anybody waiting
                for job in dict.fromkeys(chunk.job for chunk in self._active):
                    self._end(job, EngineError(f"the engine failed: {error!r}"))

    def _turn(self) -> None:
        """One call of the network or decoder, after what those that begin with it need."""
        self._drop_the_ended()
        group = self._next_group()
        if new := [chunk for chunk in group if chunk.turn is None]:
            self._share.begin(new)
            self._begin(new)
            for chunk in new:
                chunk.job.future.begun = True
            self._drop_the_ended()
            group = [chunk for chunk in group if chunk in self._active]
        if group:
            work = self._sample if self._whole else self._decode if self._is_drawn(group[0]) else self._denoise
            self._guarded(work, group)

    def _begin(self, new: Sequence[Chunk]) -> None:
        """What chunks need before their first step; prompts are encoded together, those in the cache not at all."""
        for own in _by_job(new).values():
            if own[0].job.request.image is not None:
                self._guarded(self._start_from_image, own)
        if self._whole and not self._has_embedding_samplers(new):
            return
        if unknown := [chunk for own in _by_job(new).values() if not self._recall(own[0].job) for chunk in own]:
            self._guarded(self._encode, unknown)
        for chunk in new:
            told = [self.backend.upload(np.full(chunk.rows, chunk.job.guidance, np.float32))] if self._is_told else []
            job = chunk.job
            if job.negative is not None and not job.against:
                job.against = tuple(0 * one for one in job.conditions)
            chunk.conditions, chunk.against = (
                (*(self.backend.join([one] * chunk.rows) for one in conditions), *told) if conditions else ()
                for conditions in (job.conditions, job.against)
            )

    def _has_embedding_samplers(self, new: Sequence[Chunk]) -> bool:
        names = {f"sampler_{chunk.job.steps}_from_embeddings" for chunk in new}
        return "text_encoder" in self._graphs and names <= set(self._graphs)

    def _recall(self, job: Job) -> bool:
        """Whether its prompt is known: to the job, of which chunks were drawn before, or to the cache."""
        if not job.conditions and (found := self.cache.find(job.tokens)) is not None:
            job.conditions, job.cached = tuple(found), True
        negative = self._unknown_negative(job)
        if negative is not None and (found := self.cache.find(negative)) is not None:
            job.against = tuple(found)
        return bool(job.conditions) and self._unknown_negative(job) is None

    def _unknown_negative(self, job: Job) -> Tokens | None:
        """The tokens of a negative prompt that is still to be encoded. An empty one may be zeros, no text."""
        is_zero = self._empty_is_zero and not job.request.negative_prompt
        return None if job.against or is_zero else job.negative

    def _encode(self, group: Sequence[Chunk]) -> None:
        """One call for the prompts of several jobs, negative ones included."""
        jobs = list(_by_job(group))
        prompts = [(job, job.tokens) for job in jobs if not job.conditions]
        prompts += [(job, negative) for job in jobs if (negative := self._unknown_negative(job)) is not None]
        tokens = {name: np.concatenate([own[name] for _, own in prompts]) for name in jobs[0].tokens}
        conditions = _timed(jobs, "encode", lambda: self.backend.encode(tokens))
        for i, (job, own) in enumerate(prompts):
            kept = tuple(self.cache.keep(own, tuple(condition[i : i + 1] for condition in conditions)))
            if own is job.tokens:
                job.conditions = kept
            else:
                job.against = kept

    def _start_from_image(self, chunks: Sequence[Chunk]) -> None:
        """The picture as latents, noised to the level of the step where drawing begins."""
        job = chunks[0].job
        request, plan = job.request, self._plans[job.steps]
        if job.start is None:
            assert request.image is not None
            image = request.image[None]
            latents = _timed([job], "encode", lambda: self.backend.encode_image(image))
            mask = None if request.mask is None else self.backend.upload(latent_mask(request.mask, self._downscale))
            job.start = Start(latents, mask)
        strength = request.strength or (DEFAULT_STRENGTH if job.start.mask is None else 1.0)
        for chunk in chunks:
            chunk.start, chunk.step = job.start, first_step(plan.timesteps, self._last, strength)
            if strength < 1:
                chunk.x = chunk.start.at(self.backend.upload(chunk.noise), *plan.levels[chunk.step])

    def _next_group(self) -> list[Chunk]:
        """The chunks of the next call: those that go with the first, as many as fit; with other clients about, no client
        takes all of it, since they would wait the longer for the next."""
        waiting = self._share.ordered(self._active)
        clients, most = {chunk.job.client.name for chunk in waiting}, self.max_batch
        if company := self._share.has_company(clients):
            most = max(1, most // max(4, len(clients)))
        else:
            waiting = [chunk for chunk in waiting if self._is_drawn(chunk)] or waiting
        group: list[Chunk] = []
        rows, own = 0, Counter[str]()
        for chunk in waiting:
            client = chunk.job.client.name
            asked = chunk.rows if self._is_drawn(chunk) else chunk.network_rows
            fits = rows + asked <= self.max_batch and (own[client] + asked <= most or not own[client])
            alike = not group or not company or self._is_large(chunk) == self._is_large(group[0])
            if not group or (fits and alike and self._go_together(chunk, group[0])):
                group.append(chunk)
                rows += asked
                own[client] += asked
        return group

    def _is_large(self, chunk: Chunk) -> bool:
        """With other clients about, a large request's pictures do not ride in the calls of small ones, which they make longer."""
        return chunk.job.request.count > self.max_batch

    def _go_together(self, one: Chunk, other: Chunk) -> bool:
        return (
            one.job.size == other.job.size
            and self._is_drawn(one) == self._is_drawn(other)
            and (not self._whole or one.job.steps == other.job.steps)
        )

    def _is_drawn(self, chunk: Chunk) -> bool:
        return not self._whole and chunk.step == len(self._plans[chunk.job.steps].times)

    def _denoise(self, group: Sequence[Chunk]) -> None:
        """One network call and update; every chunk is a step further."""
        jobs = list(dict.fromkeys(chunk.job for chunk in group))
        x = _timed(jobs, "copy", lambda: self.backend.join([self._latents(chunk) for chunk in group]))
        m = self._predicted(jobs, group, x)
        a, b, c = (self._column(group, name) for name in ("a", "b", "c"))
        fresh = (c, self.backend.join([self._fresh(chunk) for chunk in group])) if c.any() else None
        x = _timed(jobs, "update", lambda: self.backend.update(x, m, a, b, fresh))
        parts, start = [], 0
        for chunk in group:  # nothing is committed before all is computed: a failing call is tried again
            part = x if len(group) == 1 else x[start : start + chunk.rows]
            if chunk.start is not None:
                plan, noise = self._plans[chunk.job.steps], self.backend.upload(chunk.noise)
                part = chunk.start.kept(part, noise, *plan.levels[chunk.step + 1])
            parts.append(part)
            start += chunk.rows
        for chunk, part in zip(group, parts, strict=True):
            chunk.x, chunk.step = part, chunk.step + 1

    def _predicted(self, jobs: Sequence[Job], group: Sequence[Chunk], x: Array) -> Array:
        """The network's answer for each picture; that for the prompt is weighed against that for the negative prompt where
        there is one: m = m_u + w (m_c - m_u). One call, unless that makes more rows than a call may have."""
        join, times, starts = self.backend.join, self._column(group, "times"), _starts(group)
        guided = [(chunk, start) for chunk, start in zip(group, starts, strict=True) if chunk.against]
        rows = [x, *(x[start : start + chunk.rows] for chunk, start in guided)]
        times = np.concatenate([times, *(times[start : start + chunk.rows] for chunk, start in guided)])
        conditions = [*(chunk.conditions for chunk in group), *(chunk.against for chunk, _ in guided)]
        x, joined = _timed(jobs, "copy", lambda: (join(rows), tuple(map(join, zip(*conditions, strict=True)))))
        m = _timed(jobs, "denoise", lambda: self._ask(x, times, joined))
        if not guided:
            return m
        own, after = [], sum(chunk.rows for chunk in group)
        for chunk, start in zip(group, starts, strict=True):
            part = m[start : start + chunk.rows]
            if chunk.against:
                other = m[after : after + chunk.rows]
                part, after = other + chunk.job.guidance * (part - other), after + chunk.rows
            own.append(part)
        return join(own)

    def _ask(self, x: Array, times: NDArray[np.float32], conditions: Sequence[Array]) -> Array:
        """The denoiser's answer, in as few calls as may be."""
        answers = []
        for start in range(0, len(times), self.max_batch):
            rows = slice(start, min(len(times), start + self.max_batch))
            whole = rows.stop - start == len(times)
            given = conditions if whole else tuple(one[rows] for one in conditions)
            answers.append(self.backend.denoise(x if whole else x[rows], times[rows], tuple(given)))
            self.counts[f"batch {rows.stop - start}"] += 1
        return self.backend.join(answers)

    def _fresh(self, chunk: Chunk) -> Array:
        """The noise z of the chunk's next step, nought where it takes none."""
        renoised = self._plans[chunk.job.steps].renoised
        if chunk.step not in renoised:
            return self.backend.upload(np.zeros_like(chunk.noise))
        return self.backend.upload(np.ascontiguousarray(chunk.noises[:, 1 + renoised.index(chunk.step)]))

    def _column(self, group: Sequence[Chunk], name: str) -> NDArray[np.float32]:
        """One value per image: that of its plan at its step."""
        values = [getattr(self._plans[chunk.job.steps], name)[chunk.step] for chunk in group]
        return np.concatenate([np.full(c.rows, value, np.float32) for c, value in zip(group, values, strict=True)])

    def _latents(self, chunk: Chunk) -> Array:
        start = self._plans[chunk.job.steps].start
        return self.backend.upload(chunk.noise * np.float32(start)) if chunk.x is None else chunk.x

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
            inputs: list[Any] = [join(parts) for parts in zip(*(chunk.conditions for chunk in group), strict=True)]
        else:
            keys = jobs[0].tokens
            inputs = [np.concatenate([chunk.job.tokens[key].repeat(chunk.rows, 0) for chunk in group]) for key in keys]
            if self._is_told:
                inputs.append(np.concatenate([np.full(c.rows, c.job.guidance, np.float32) for c in group]))
        noises = [join([self.backend.upload(chunk.noise) for chunk in group])]
        if self._plans[jobs[0].steps].renoised:
            noises.append(join([self.backend.upload(np.ascontiguousarray(chunk.noises[:, 1:])) for chunk in group]))
        images, finite = _timed(jobs, "sampler", lambda: self.backend.sample(name, inputs, *noises))
        self.counts[f"batch {len(images)}"] += 1
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


def _starts(chunks: Sequence[Chunk]) -> list[int]:
    """The row of a joined batch at which each chunk begins."""
    return [0, *itertools.accumulate(chunk.rows for chunk in chunks)][:-1]


def _by_job(chunks: Iterable[Chunk]) -> dict[Job, list[Chunk]]:
    found: dict[Job, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.job, []).append(chunk)
    return found


def _timed(jobs: Sequence[Job], stage: str, work: Callable[[], T]) -> T:
    stop = jobs[0].stopwatch()
    value = work()
    seconds = stop()
    for job in jobs:
        job.spent(stage, seconds)
    return value
