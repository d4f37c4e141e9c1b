"""Embeddings of the prompts seen last: a repeated prompt skips the text encoder."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RequestError

Conditions = tuple[NDArray[Any], ...]  # what the text encoder gives the denoiser, each (B, ...)
DEFAULT_BYTES = 64 * 2**20


class PromptCache:
    """A least-recently-used cache from token ids to embeddings, bounded in bytes. Thread-safe; 0 bytes turn it off.

    The key is the ids themselves, so prompts that differ only in what the tokenizer drops share an entry. An entry larger
    than the bound is returned but not kept. hits and misses count the lookups.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise RequestError(f"the prompt cache's size must be a whole number of bytes >= 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.used_bytes = 0
        self._entries: OrderedDict[bytes, Conditions] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tokens: Mapping[str, NDArray[np.int64]], encode: Callable[[], Conditions]) -> Conditions:
        """The conditions of one prompt's tokens, read-only; `encode` is called, outside the lock, where they are not kept."""
        key = b"".join(ids.tobytes() for ids in tokens.values())
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self.hits += 1
                return found
            self.misses += 1
        conditions = encode()
        for condition in conditions:
            condition.setflags(write=False)
        if key and _bytes(conditions) <= self.max_bytes:
            self._keep(key, conditions)
        return conditions

    def clear(self) -> None:
        """Forget every entry; the counts stay."""
        with self._lock:
            self._entries.clear()
            self.used_bytes = 0

    def _keep(self, key: bytes, conditions: Conditions) -> None:
        with self._lock:
            if key in self._entries:  # another thread was faster
                return
            self._entries[key] = conditions
            self.used_bytes += _bytes(conditions)
            while self.used_bytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.used_bytes -= _bytes(oldest)


def _bytes(conditions: Conditions) -> int:
    return sum(condition.nbytes for condition in conditions)
