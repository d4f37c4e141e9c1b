"""Embeddings of the prompts seen last: a repeated prompt skips the text encoder."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import numpy as np
from cachetools import LRUCache

from ..core.errors import RequestError
from .backends.base import Conditions, LoraSet
from .tokenizer import Tokens

DEFAULT_BYTES = 64 * 2**20


class PromptCache:
    """A least-recently-used cache from token ids to embeddings, bounded in bytes. Thread-safe; 0 bytes turn it off.

    The key is the ids themselves, so prompts that differ only in what the tokenizer drops share an entry, with the LoRAs
    of the text encoder that reads them. An entry larger than the bound is returned but not kept. hits and misses count the lookups.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise RequestError(f"the prompt cache's size must be a whole number of bytes >= 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._entries: LRUCache[tuple[bytes, LoraSet], Conditions] = LRUCache(max_bytes, getsizeof=bytes_of)
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """What the entries take."""
        return int(self._entries.currsize)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Tokens, loras: LoraSet = ()) -> Conditions | None:
        """The conditions of one prompt's tokens, or None."""
        with self._lock:
            found = self._entries.get(_key(tokens, loras))
            self.hits += found is not None
            self.misses += found is None
            return found

    def keep(self, tokens: Tokens, conditions: Conditions, loras: LoraSet = ()) -> Conditions:
        """Remembers them, as copies that own their memory and, of NumPy, cannot be written; returns what is remembered."""
        own = tuple(_owned(condition) for condition in conditions)
        with self._lock, suppress(ValueError):  # larger than the whole cache
            self._entries[_key(tokens, loras)] = own
        return own

    def clear(self) -> None:
        """Forget every entry; the counts stay."""
        with self._lock:
            self._entries.clear()


def _key(tokens: Tokens, loras: LoraSet) -> tuple[bytes, LoraSet]:
    return b"".join(ids.tobytes() for ids in tokens.values()), loras


def _owned(condition: Any) -> Any:
    """A slice of a batch would keep the whole batch alive."""
    if not isinstance(condition, np.ndarray):
        return condition.clone()
    copy = condition.copy()
    copy.setflags(write=False)
    return copy


def bytes_of(conditions: Conditions) -> int:
    """What they take."""
    return sum(condition.nbytes for condition in conditions)
