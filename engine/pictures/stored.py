"""Pictures that have an address for an hour."""

from __future__ import annotations

import secrets
import threading

from cachetools import TTLCache

KEPT_FOR = 3600  # seconds


class StoredPictures:
    """Files by names that nobody guesses, for an hour; the oldest go where there is no room. Any thread keeps and finds.
    max_bytes: of all of them."""

    def __init__(self, max_bytes: int) -> None:
        self._files: TTLCache[str, bytes] = TTLCache(max_bytes, KEPT_FOR, getsizeof=len)
        self._lock = threading.Lock()

    def keep(self, file: bytes, kind: str) -> str:
        """Its name."""
        name = f"{secrets.token_hex(16)}.{kind}"  # letters and digits alone: chat programs look for \w+\.png
        if len(file) <= self._files.maxsize:
            with self._lock:
                self._files[name] = file
        return name

    def find(self, name: str) -> bytes | None:
        with self._lock:
            return self._files.get(name)
