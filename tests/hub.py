"""Folders as repositories in a cache laid out as the Hugging Face hub's: contents in `blobs/`, links in `snapshots/`."""

from __future__ import annotations

import hashlib
from pathlib import Path

REVISION = "a" * 40


def publish(cache: Path, name: str, folder: Path) -> Path:
    """Puts the folder's files there as the repository `name`; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for place in (repository / "refs", repository / "blobs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot
