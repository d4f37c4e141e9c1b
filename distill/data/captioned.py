"""Pictures with captions of one's own: folders, WebDataset tars, and what the library `datasets` reads."""

from __future__ import annotations

import csv
import glob
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ImagineFlashError, nearest
from .columns import CAPTIONS, loaded, rows_of

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Captioned:
    """One picture: what it is called in messages, the file or the bytes of one, and its caption where it has one."""

    name: str
    picture: Path | bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Where pictures come from: a folder, a tar or a pattern of such, a folder of `datasets` or an id of the hub's.

    columns: (picture, caption), where a set calls them otherwise than image and text; folders and tars read the second.
    buckets: each picture keeps about its shape, instead of being cropped to the teacher's.
    """

    place: str
    columns: tuple[str, str] | None = None
    buckets: bool = False

    def files(self) -> list[Path]:
        """What is read here, in order; none for an id of the hub's."""
        if Path(self.place).is_dir():
            return sorted(path for path in Path(self.place).rglob("*") if path.is_file() and path.name[0] != ".")
        return sorted(path for path in map(Path, glob.glob(self.place)) if path.is_file())

    def identity(self) -> list[Any]:
        """What the pictures are known by without reading them: names, sizes and times of the files. A set of the hub's is
        what it was when it was read first."""
        folder = Path(self.place) if Path(self.place).is_dir() else Path()
        stats = [(path, path.stat()) for path in self.files()]
        files = [(os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return [*(files or [self.place]), *(self.columns or ())]

    def __iter__(self) -> Iterator[Captioned]:
        """The pictures, in the same order every time. ImagineFlashError for what is none of these."""
        files, keys = self.files(), _Keys(CAPTIONS if self.columns is None else self.columns[1:])
        if any(path.suffix in (".parquet", ".arrow") for path in files) or (not files and _is_hub_id(self.place)):
            yield from (Captioned(*row) for row in rows_of(loaded(self.place), self.place, self.columns))
        elif tars := [path for path in files if ".tar" in path.suffixes]:
            for path in tars:
                yield from _of_tar(path, keys)
        elif metadata := [path for path in files if path.name in _METADATA]:
            for path in metadata:
                yield from _of_metadata(path, keys)
        elif pictures := [path for path in files if path.suffix.lower() in PICTURES]:
            for path in pictures:
                text = path.with_suffix(".txt")
                yield Captioned(str(path), path, _caption_of(text.read_bytes(), text, keys) if text.is_file() else "")
        else:
            raise self._nothing()

    def check(self) -> None:
        """ImagineFlashError where there is nothing; a set of the hub's is not asked for."""
        if not self.files() and not _is_hub_id(self.place):
            raise self._nothing()

    def _nothing(self) -> ImagineFlashError:
        return ImagineFlashError(
            f"no pictures at {self.place}; give a folder of {', '.join(PICTURES)} with metadata.jsonl or NAME.txt "
            "beside NAME.jpg, WebDataset tars, a folder of Hugging Face's datasets, or a hub id (owner/name)"
        )


def picture_source(place: str | None, columns: str | None = None, buckets: bool = False) -> PictureSource | None:
    """What was typed of pictures; columns: "PICTURE,CAPTION". ImagineFlashError for what says nothing."""
    if place is None:
        if columns or buckets:
            raise ImagineFlashError("--columns and --buckets say how pictures are read; give them by --pictures")
        return None
    names = tuple(name.strip() for name in columns.split(",")) if columns is not None else None
    if names is not None and (len(names) != 2 or not all(names)):
        raise ImagineFlashError(f"--columns must be PICTURE,CAPTION, such as image,text, got {columns!r}")
    return PictureSource(place=place, columns=names, buckets=buckets)  # type: ignore[arg-type]


def _is_hub_id(place: str) -> bool:
    return not Path(place).exists() and place.count("/") == 1 and not glob.has_magic(place) and place[0] not in "./~"


class _Keys:
    """The keys that a caption may have, the first one that a row has counts; and whether any row has had one."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.met = names, False

    def caption(self, row: Any, source: Path) -> str:
        """Nothing for a row without such a key; ImagineFlashError that names the keys there are, where no row has had one yet."""
        known = list(row) if isinstance(row, dict) else []
        for name in self.names:
            if name in known:
                self.met = True
                return " ".join(str(row[name] or "").split())
        if self.met:
            return ""
        raise ImagineFlashError(
            f"{source} has no {' or '.join(map(repr, self.names))}{nearest(self.names[0], known)}; it has "
            f"{', '.join(map(str, known))}: name the caption with --columns image,NAME"
        )


def _of_metadata(path: Path, keys: _Keys) -> Iterator[Captioned]:
    """The rows of a metadata.jsonl or metadata.csv, as Hugging Face's ImageFolder has them."""
    for row in _rows(path):
        name = str(row.get("file_name") or "")
        plain = Path(os.path.normpath(name))  # links are not followed: what they lead to may lie elsewhere
        if not name or plain.anchor or plain.parts[:1] in ((), ("..",)):
            raise ImagineFlashError(f"{path}: file_name must name a file of this folder, got {name!r}")
        yield Captioned(str(path.parent / name), path.parent / plain, keys.caption(row, path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for line in filter(str.strip, file):
                if not isinstance(row := json.loads(line), dict):
                    raise ValueError(f"a line is no object: {line.strip()[:40]}")
                yield row
    except (ValueError, csv.Error) as error:
        raise ImagineFlashError(f"cannot read {path}: {error}") from None


def _of_tar(path: Path, keys: _Keys) -> Iterator[Captioned]:
    """The samples of a WebDataset shard: files that follow one another with one name up to its first dot. Only pictures,
    .txt and .json are read, whatever else is there."""
    sample: dict[str, bytes] = {}
    last = ""
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                if member.isfile() and stem and f".{ending.lower()}" in (*PICTURES, ".txt", ".json"):
                    if (key := f"{folder}/{stem}") != last:
                        yield from _sample(path, last, sample, keys)
                        sample, last = {}, key
                    if (data := tar.extractfile(member)) is not None:
                        sample[f".{ending.lower()}"] = data.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ImagineFlashError(f"cannot read {path} ({error}); fetch it again, or leave it out") from None
    yield from _sample(path, last, sample, keys)


def _sample(path: Path, key: str, sample: dict[str, bytes], keys: _Keys) -> Iterator[Captioned]:
    name = f"{path}:{key.lstrip('/')}"
    for ending in (".txt", ".json"):
        caption = _caption_of(sample[ending], Path(name + ending), keys) if ending in sample else ""
        if caption:
            break
    yield from (Captioned(name + ending, sample[ending], caption) for ending in PICTURES if ending in sample)


def _caption_of(data: bytes, source: Path, keys: _Keys) -> str:
    """Of a .txt its whole text, of a .json the value of the first of the keys that it has; nothing where it is neither."""
    try:
        text = data.decode("utf-8-sig")
        row = json.loads(text) if source.suffix == ".json" else None
    except ValueError:
        return ""
    if source.suffix != ".txt":
        return keys.caption(row, source)
    keys.met = keys.met or bool(text.strip())  # a .json without a key is then of a sample whose .txt is empty
    return " ".join(text.split())
