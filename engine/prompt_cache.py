"""Embeddings of the prompts seen last: a repeated prompt skips the text encoder."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RequestError

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
        self._entries: OrderedDict[bytes, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, ids: NDArray[np.int64], encode: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The embeddings of `ids` (1, L), read-only; `encode` is called, outside the lock, where they are not kept."""
        key = ids.tobytes()
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self.hits += 1
                return found
            self.misses += 1
        embeddings = encode()
        embeddings.setflags(write=False)
        if key and embeddings.nbytes <= self.max_bytes:
            self._keep(key, embeddings)
        return embeddings

    def clear(self) -> None:
        """Forget every entry; the counts stay."""
        with self._lock:
            self._entries.clear()
            self.used_bytes = 0

    def _keep(self, key: bytes, embeddings: NDArray[Any]) -> None:
        with self._lock:
            if key in self._entries:  # another thread was faster
                return
            self._entries[key] = embeddings
            self.used_bytes += embeddings.nbytes
            while self.used_bytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.used_bytes -= oldest.nbytes
