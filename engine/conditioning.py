"""From the prompts of chunks to the conditions of their network calls: known to the cache, or encoded together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..folders.manifests import Guidance
from .backends.base import Array, Backend, LoraSet
from .prompt_cache import PromptCache
from .tokenizer import Tokens, rows_of_prompt
from .work import Chunk, Job, by_job, timed


class Conditioning:
    """Gives chunks what the denoiser reads of their prompts, negative ones included."""

    def __init__(self, backend: Backend, cache: PromptCache, guidance: Guidance) -> None:
        self.backend, self.cache, self.guidance = backend, cache, guidance

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

    def give(self, new: Sequence[Chunk]) -> None:
        """One row of its job's conditions for each picture."""
        for chunk in new:
            job, told = chunk.job, ()
            if self.guidance.embedded:
                told = (self.backend.upload(np.full(chunk.rows, job.guidance, np.float32)),)
            if job.negative is not None and not job.against:
                job.against = tuple(0 * one for one in job.conditions)
            chunk.conditions, chunk.against = (
                (*(self.backend.join([one] * chunk.rows) for one in conditions), *told) if conditions else ()
                for conditions in (job.conditions, job.against)
            )

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
