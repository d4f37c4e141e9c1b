"""What lies in this project's cache: exported models, and what backends compiled; listing it, and making room."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..core.errors import ArtifactError, nearest
from .files import ARTIFACT_FILE, CACHE_VARIABLE, STUDENT_FILE, cache_folder
from .reading import read_artifact_manifest

EXPORTS, STUDENTS = "exports", "students"
LOCKS = "locks"  # empty files, which somebody may hold
COMPILED = "compiled"  # what the kind of all else is called
HALF_WRITTEN = re.compile(r"\..+\.tmp-[0-9a-f]{8}.*")  # what a killed writer leaves: `atomic_folder`
HALF_WRITTEN_AGE = 24 * 3600  # seconds after which nobody is writing it any more
DAY = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Cached:
    """One thing in the cache. kind: "exports" (models), "students" (links to their weights) or "compiled" (of a backend's name).

    source: the hub id or folder that it was made of, where it says so. bytes: of files, links not followed. used: seconds
    since 1970. version: of this package, that an export was made by.
    """

    kind: str
    name: str
    path: Path
    source: str = ""
    bytes: int
    used: float
    version: str = ""


def export_folder(key: str, name: str) -> Path | None:
    """Where the export of a student goes; None without a cache. key: of the student's content."""
    cache = cache_folder(EXPORTS)
    return None if cache is None else cache / f"{key}-{version('imagine-flash')}" / name


def mark_used(folder: Path) -> None:
    """What `Cached.used` says from now on."""
    with suppress(OSError):  # another user's cache
        os.utime(folder)


def cached() -> list[Cached]:
    """Everything in the cache, the exports first, the newest use first."""
    found = [_export(path) for path in _folders(EXPORTS, ARTIFACT_FILE)]
    found.sort(key=lambda one: -one.used)
    students = list(_folders(STUDENTS, STUDENT_FILE))
    found += [_of(STUDENTS, path.name, path) for path in students]
    root = cache_folder("")
    for path in sorted(root.iterdir() if root else ()):
        if path.is_dir() and path.name not in (EXPORTS, STUDENTS, LOCKS) and any(path.iterdir()):
            found.append(_of(COMPILED, path.name, path))
    return found


def remove(names: list[str]) -> list[Cached]:
    """Removes what has one of these names or sources, and the links of the same name; returns what went.

    Raises ArtifactError for a name that nothing has, before anything is removed.
    """
    there = cached()
    known = {label for one in there for label in (one.name, one.source) if label}
    for name in names:
        if name not in known:
            raise ArtifactError(f"the cache has no {name!r}{nearest(name, known)}; see: imagine-flash cache list")
    chosen = [one for one in there if {one.name, one.source} & set(names)]
    return [_removed(one) for one in chosen]


def prune(days: float) -> list[Cached]:
    """Removes exports of other versions of this package and those that nobody used for so many days, compiled files as old,
    links that lead nowhere, and what killed writers left; returns what went."""
    before, gone = time.time() - days * DAY, list[Cached]()
    for one in cached():
        old = one.used < before or (bool(one.version) and one.version != version("imagine-flash"))
        broken = one.kind == STUDENTS and any(not path.exists() for path in one.path.rglob("*") if path.is_symlink())
        if old or broken:
            gone.append(_removed(one))
    root = cache_folder("")
    for path in sorted(root.glob("*/*/*") if root else ()):
        if HALF_WRITTEN.fullmatch(path.name) and path.lstat().st_mtime < time.time() - HALF_WRITTEN_AGE:
            gone.append(_removed(_of("half-written", path.name, path)))
    return gone


def check_room(place: Path, needed: int, what: str) -> None:
    """Raises ArtifactError where the disk that `place` is to be on has less than `needed` bytes left."""
    there = next((folder for folder in (place, *place.parents) if folder.exists()), None)
    free = shutil.disk_usage(there).free if there else needed
    if free < needed:
        raise ArtifactError(
            f"{what} takes about {gib(needed)} at {place}, where {gib(free)} are free; make room (imagine-flash cache prune), "
            f"choose another place, or set {CACHE_VARIABLE} to a folder with room"
        )


def gib(amount: float) -> str:
    """ "2.3 GiB"."""
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**29 else f"{amount / 2**20:.1f} MiB"


def _folders(kind: str, file: str) -> Iterator[Path]:
    cache = cache_folder(kind)
    for path in sorted(cache.glob(f"*/*/{file}") if cache else ()):
        if not HALF_WRITTEN.fullmatch(path.parent.name):
            yield path.parent


def _export(path: Path) -> Cached:
    """Also of a damaged one, which can be removed."""
    source = ""
    with suppress(ArtifactError):
        source = read_artifact_manifest(path, verify=False).sources.get("weights", "")
    return _of(EXPORTS, path.name, path, source=source, version=path.parent.name.partition("-")[2])


def _of(kind: str, name: str, path: Path, *, source: str = "", version: str = "") -> Cached:
    files = [file.lstat() for file in (path, *path.rglob("*"))]
    return Cached(
        kind=kind,
        name=name,
        path=path,
        source=source,
        version=version,
        bytes=sum(file.st_size for file in files[1:]) if path.is_dir() else files[0].st_size,
        used=max(file.st_mtime for file in files) if kind == COMPILED else files[0].st_mtime,
    )


def _removed(one: Cached) -> Cached:
    """Renamed first, so that nobody finds half of it."""
    aside = one.path.with_name(f".{one.path.name}.tmp-{os.urandom(4).hex()}")
    try:
        os.rename(one.path, aside)
    except OSError as error:
        raise ArtifactError(f"cannot remove {one.path}: {(error.strerror or str(error)).lower()}") from None
    shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
    with suppress(OSError):  # others lie beside it
        one.path.parent.rmdir()
    return one
