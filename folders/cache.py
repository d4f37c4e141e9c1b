"""What lies in this project's cache: exported models, and what backends compiled; listing it, and making room."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
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
    """Everything in the cache, the exports first, the newest use first; without what others take away meanwhile."""
    exports = [one for path in _folders(EXPORTS, ARTIFACT_FILE) if (one := _export(path))]
    students = [_of(STUDENTS, path.name, path) for path in _folders(STUDENTS, STUDENT_FILE)]
    root = cache_folder("")
    compiled = [
        _of(COMPILED, path.name, path)
        for path in sorted(root.iterdir() if root else ())
        if path.name not in (EXPORTS, STUDENTS, LOCKS) and _inside(path)
    ]
    return [*sorted(exports, key=lambda one: -one.used), *(one for one in (*students, *compiled) if one)]


def remove(names: list[str]) -> list[Cached]:
    """Removes what has one of these names or sources, and the links of the same name; returns what went.

    Raises ArtifactError for a name that nothing has, before anything is removed.
    """
    there = cached()
    known = {label for one in there for label in (one.name, one.source) if label}
    for name in names:
        if name not in known:
            raise ArtifactError(f"the cache has no {name!r}{nearest(name, known)}; see: imagine-flash cache list")
    return _removed([one for one in there if {one.name, one.source} & set(names)])


def prune(days: float) -> list[Cached]:
    """Removes exports of other versions of this package and those that nobody used for so many days, compiled files as old,
    links that lead nowhere, and what killed writers left; returns what went. Raises ArtifactError for what cannot be removed,
    after the rest is."""
    now, chosen = time.time(), list[Cached]()
    for one in cached():
        old = one.used < now - days * DAY or (bool(one.version) and one.version != version("imagine-flash"))
        broken = one.kind == STUDENTS and any(not path.exists() for path in _inside(one.path) if path.is_symlink())
        if old or broken:
            chosen.append(one)
    for path in _matching(cache_folder(""), "*/*/*"):
        one = _of("half-written", path.name, path) if HALF_WRITTEN.fullmatch(path.name) else None
        if one is not None and one.used < now - HALF_WRITTEN_AGE:
            chosen.append(one)
    return _removed(chosen)


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
    for path in _matching(cache_folder(kind), f"*/*/{file}"):
        if not HALF_WRITTEN.fullmatch(path.parent.name):
            yield path.parent


def _matching(folder: Path | None, pattern: str) -> list[Path]:
    """As Path.glob, which raises where others take folders away meanwhile."""
    return sorted(folder / name for name in glob(pattern, root_dir=folder, include_hidden=True)) if folder else []


def _inside(folder: Path) -> list[Path]:
    """As Path.rglob("*"), which raises where others take folders away meanwhile."""
    return [Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)]


def _export(path: Path) -> Cached | None:
    """Also of a damaged one, which can be removed."""
    source = ""
    with suppress(ArtifactError, OSError):
        source = read_artifact_manifest(path, verify=False).sources.get("weights", "")
    return _of(EXPORTS, path.name, path, source=source, version=path.parent.name.partition("-")[2])


def _of(kind: str, name: str, path: Path, *, source: str = "", version: str = "") -> Cached | None:
    """None for what is gone."""
    try:
        files = [path.lstat()]
    except OSError:
        return None
    for file in _inside(path):
        with suppress(OSError):
            files.append(file.lstat())
    return Cached(
        kind=kind,
        name=name,
        path=path,
        source=source,
        version=version,
        bytes=sum(file.st_size for file in files[1:]) if path.is_dir() else files[0].st_size,
        used=max(file.st_mtime for file in files) if kind == COMPILED else files[0].st_mtime,
    )


def _removed(chosen: Sequence[Cached]) -> list[Cached]:
    """What went of these. Raises ArtifactError for the first that cannot, after all others went."""
    gone, kept = list[Cached](), list[str]()
    for one in chosen:
        aside = one.path.with_name(f".{one.path.name}.tmp-{os.urandom(4).hex()}")
        try:
            os.rename(one.path, aside)  # first, so that nobody finds half of it
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            kept.append(f"cannot remove {one.path}: {(error.strerror or str(error)).lower()}")
            continue
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
        with suppress(OSError):  # others lie beside it
            one.path.parent.rmdir()
        gone.append(one)
    if kept:
        raise ArtifactError(f"{kept[0]}; {len(gone)} of {len(chosen)} were removed")
    return gone
