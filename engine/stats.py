"""What an engine says of itself while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from .batching import Batcher
from .prompt_cache import PromptCache


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the engine was loaded, but for `waiting`: pictures that were asked for and are not drawn yet.

    pictures: drawn; cancelled, expired, failed: requests that were not. failed_in_a_row: requests that the backend has
    failed since the last that it drew. batches: network calls by the number of their pictures. cache_hits, cache_misses:
    prompts whose embeddings were known and were not; cache_bytes: what the known ones take.
    """

    waiting: int
    pictures: int
    cancelled: int
    expired: int
    failed: int
    failed_in_a_row: int
    batches: dict[int, int]
    cache_hits: int
    cache_misses: int
    cache_bytes: int

    @classmethod
    def of(cls, batcher: Batcher, cache: PromptCache) -> EngineStats:
        counts = dict(batcher.counts)
        sizes = (name for name in counts if name.startswith("batch "))
        return cls(
            waiting=batcher.waiting,
            failed_in_a_row=batcher.failed_in_a_row,
            batches={int(name.removeprefix("batch ")): counts[name] for name in sizes},
            cache_hits=cache.hits,
            cache_misses=cache.misses,
            cache_bytes=cache.used_bytes,
            **{name: counts.get(name, 0) for name in ("pictures", "cancelled", "expired", "failed")},
        )
