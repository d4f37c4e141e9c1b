"""Hashes and atomic writes: a killed writer leaves the old file or folder whole."""

import ctypes
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import ArtifactError

STUDENT_FILE = "imagine_flash.json"
ARTIFACT_FILE = "manifest.json"
NETWORKS_FILE = "networks.json"  # of an artifact: what its networks are made of
CACHE_VARIABLE = "IMAGINE_FLASH_CACHE"  # a folder; empty turns the cache off
REMEMBERED_BYTES = 2**26  # of files from which on the hash is kept in the cache folder
SETTLED_NS = 2 * 10**9


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: str | Path) -> str:
    """The SHA-256 of a file that is hashed anew only where its size, dates or place changed since this process last did; of a
    large file, since any process did that shares the cache folder: a gigabyte takes 2 seconds."""
    found = os.stat(path)
    signature = (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    return _sha256_of(str(Path(path).resolve()), found.st_size, *signature)


@functools.lru_cache(4096)
def _sha256_of(path: str, size: int, *signature: int) -> str:
    cache = cache_folder("hashes") if size >= REMEMBERED_BYTES else None
    if cache is None:
        return sha256_file(path)
    note = cache / hashlib.sha256(repr((path, size, *signature)).encode()).hexdigest()[:32]
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", known := note.read_text(encoding="ascii")):
            return known
    digest = sha256_file(path)
    if (
        time.time_ns() - max(signature[:2]) > SETTLED_NS
    ):  # a date may be too coarse to show a change that soon after another
        with suppress(OSError, ArtifactError), atomic_file(note) as temporary:
            temporary.write_text(digest, encoding="ascii")
    return digest


def hash_files(folder: str | Path, *, leave_out: Sequence[str] = (ARTIFACT_FILE,)) -> dict[str, str]:
    """relative path (with '/') -> SHA-256 of every file under `folder`, sorted, without those in `leave_out`."""
    root = Path(folder)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name: sha256_file(root / name) for name in names if name not in leave_out}


def hash_folder(folder: str | Path) -> str:
    """One SHA-256 for a folder: of its file names and contents, whatever its own name, dates or place."""
    digest = hashlib.sha256()
    for name, content in hash_files(folder, leave_out=()).items():
        digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


@contextmanager
def atomic_folder(target: str | Path, *, replaces: Sequence[str] = (STUDENT_FILE, ARTIFACT_FILE)) -> Iterator[Path]:
    """Yields an empty sibling `.{name}.tmp-{random}`; on success it becomes `target` in one rename.

    An old `target` gives way only if it is an empty folder or holds one of the files named in `replaces` (a student's
    or an artifact's manifest); anything else is refused before work starts. If the body raises, the sibling is removed;
    a killed process leaves it behind, and the old folder whole. What links lead to keeps its mode, symbolic and hard
    ones: it may be somebody's weights. Raises ArtifactError.
    """
    target = Path(target).resolve()
    refuse_foreign(target, replaces)
    temporary = _sibling(target)
    try:
        temporary.mkdir()
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_symlink():
                continue
            if path.is_file() and path.stat().st_nlink == 1:
                path.chmod(mode)  # some writers leave their files to the owner alone
            _fsync(path)
        _fsync(temporary)
        refuse_foreign(target, replaces)
        _move_into_place(temporary, target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yields a sibling path to write; on success it replaces `target` in one rename, on failure it is removed.

    The sibling keeps the file's suffix, which image libraries read. Raises ArtifactError.
    """
    target = Path(target).resolve()
    if target.is_dir():
        raise ArtifactError(f"cannot write {target}: it is a folder; name a file in it")
    temporary = _sibling(target, suffix=target.suffix)
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise _cannot_write(target, error) from error
    mode = temporary.stat().st_mode  # of a new file here; some writers leave theirs to the owner alone
    try:
        yield temporary
        temporary.chmod(mode)
        _fsync(temporary)
        os.replace(temporary, target)
        _fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sibling(target: Path, suffix: str = "") -> Path:
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}{suffix}")


def refuse_foreign(target: Path, replaces: Sequence[str]) -> None:
    """Raise ArtifactError for a `target` that is a file, or a folder of something else than what may be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ArtifactError(f"cannot write the folder {target}: it is a file; choose another name")
    if any(target.iterdir()) and not any((target / name).is_file() for name in replaces):
        but = f" but no {' or '.join(replaces)}" if replaces else ""
        raise ArtifactError(f"refusing to replace {target}: it holds files{but}; choose another name or empty it")


def _cannot_write(target: Path, error: OSError) -> ArtifactError:
    if isinstance(error, FileNotFoundError):
        return ArtifactError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    return ArtifactError(f"cannot write {target}: {(error.strerror or str(error)).lower()}; choose another place")


def _move_into_place(new: Path, target: Path) -> None:
    """Renames `new` over `target`. An old folder is exchanged in one system call where there is one (Linux), else moved
    aside first; it ends up at the path `new` or is removed."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        aside = _sibling(target)
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths with renameat2(RENAME_EXCHANGE); False where the system or file system has none."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(kind: str) -> Path | None:
    """Where compiled models are kept from one process to the next; None where nothing can be written.

    $IMAGINE_FLASH_CACHE, or imagine-flash in the user's cache folder ($XDG_CACHE_HOME, ~/.cache).
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen == "":
        return None
    try:
        base = (
            Path(chosen)
            if chosen
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagine-flash"
        )
        (base / kind).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, read-only, a full disk: slower, not broken
        return None
    return base / kind if os.access(base / kind, os.W_OK) else None
