"""From the prompts and conditioning pictures of chunks to the conditions of their network calls."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from ..folders.manifests import Guidance, Size
from .backends.base import Array, Backend, Conditions, LoraSet
from .prompt_cache import DEFAULT_BYTES, PromptCache, bytes_of
from .tokenizer import Tokens, rows_of_prompt
from .work import Chunk, Job, by_job, timed


class Conditioning:
    """Gives chunks what the denoiser reads of their prompts, negative ones included: known to the cache, or encoded together;
    and of their conditioning pictures, where the model has a ControlNet or T2I-adapter (is_controlled)."""

    def __init__(
        self, backend: Backend, cache: PromptCache, guidance: Guidance, *, is_controlled: bool = False
    ) -> None:
        self.backend, self.cache, self.guidance, self.is_controlled = backend, cache, guidance, is_controlled
        self._blank: LRUCache[Size, Conditions] = LRUCache(DEFAULT_BYTES, getsizeof=bytes_of)  # of a black picture

    def unknown(self, new: Sequence[Chunk]) -> list[Chunk]:
        """Those whose prompts are still to be encoded; the others' jobs have their conditions now."""
        return [chunk for own in by_job(new).values() if not self._recall(own[0].job) for chunk in own]

    def encode(self, group: Sequence[Chunk]) -> None:
        """One call for the prompts of several jobs."""
        jobs = list(by_job(group))
        prompts = [(job, job.tokens) for job in jobs if not job.conditions]
        prompts += [(job, negative) for job in jobs if (negative := self._unknown_negative(job)) is not None]
        tokens = {name: np.concatenate([own[name] for _, own in prompts]) for name in jobs[0].tokens}
        conditions, end = timed(jobs, "encode", lambda: self.backend.encode(tokens)), 0
        for job, own in prompts:
            begin, end = end, end + rows_of_prompt(own)
            found = tuple(_joined(condition[begin:end]) for condition in conditions)
            kept = self.cache.keep(own, found, self._loras_of_text(job))
            if own is job.tokens:
                job.conditions = kept
            else:
                job.against = kept

    def read_picture(self, chunks: Sequence[Chunk]) -> None:
        """A job's conditioning picture, once; without one a black picture, which `give` lets count for nothing."""
        job = chunks[0].job
        if not job.control:
            picture = job.request.condition
            job.control = self._black(job) if picture is None else self._read(job, picture)

    def give(self, new: Sequence[Chunk]) -> None:
        """One row of its job's conditions for each picture."""
        for chunk in new:
            job = chunk.job
            told = (self._column(chunk, job.guidance),) if self.guidance.embedded else ()
            if self.is_controlled:
                control = (self.backend.join([one] * chunk.rows) for one in job.control)
                told = (*told, *control, self._column(chunk, job.request.held))
            if job.negative is not None and not job.against:
                job.against = tuple(0 * one for one in job.conditions)
            chunk.conditions, chunk.against = (
                (*(self.backend.join([one] * chunk.rows) for one in conditions), *told) if conditions else ()
                for conditions in (job.conditions, job.against)
            )

    def _black(self, job: Job) -> Conditions:
        """What is read of a black picture of its size, once."""
        if (found := self._blank.get(job.size)) is None:
            found = self._read(job, np.zeros((*job.size, 3), np.uint8))
            with suppress(ValueError):  # larger than the whole cache
                self._blank[job.size] = found
        return found

    def _read(self, job: Job, picture: NDArray[np.uint8]) -> Conditions:
        """What the denoiser reads of a conditioning picture (H, W, 3)."""
        return timed([job], "encode", lambda: self.backend.encode_condition(picture[None]))

    def _column(self, chunk: Chunk, value: float) -> Array:
        """One value for each picture."""
        return self.backend.upload(np.full(chunk.rows, value, np.float32))

    def _recall(self, job: Job) -> bool:
        """Whether its prompt is known: to the job, of which chunks were drawn before, or to the cache."""
        loras = self._loras_of_text(job)
        if not job.conditions and (found := self.cache.find(job.tokens, loras)) is not None:
            job.conditions, job.cached = tuple(found), True
        negative = self._unknown_negative(job)
        if negative is not None and (found := self.cache.find(negative, loras)) is not None:
            job.against = tuple(found)
        return bool(job.conditions) and self._unknown_negative(job) is None

    def _loras_of_text(self, job: Job) -> LoraSet:
        """Those of its LoRAs that change what the text encoder gives."""
        stages = self.backend.loras
        return tuple((name, weight) for name, weight in job.loras if "text_encoder" in stages[name])

    def _unknown_negative(self, job: Job) -> Tokens | None:
        """The tokens of a negative prompt that is still to be encoded. An empty one may be zeros, no text."""
        is_zero = self.guidance.empty_is_zero and not job.request.negative_prompt
        return None if job.against or is_zero else job.negative


def _joined(condition: Array) -> Array:
    """(n, L, D) of a prompt in n chunks -> (1, n L, D); of what has no places, as a pooled embedding (n, D), the first."""
    return condition.reshape(1, -1, condition.shape[2]) if condition.ndim == 3 else condition[:1]
