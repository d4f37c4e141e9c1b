"""Sets of pictures that the library `datasets` reads: from the hub, of parquet files, or saved by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...core.errors import ImagineFlashError, missing_extra

CAPTIONS = ("text", "caption", "prompt")  # what captions are called where nobody says it


def loaded(place: str) -> Any:
    """The set, streamed where it is large: its split "train", or the only one. Raises ImagineFlashError, MissingExtraError."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise missing_extra("datasets", "data") from None
    except ImportError as error:  # it is there, and something that it needs does not fit
        raise ImagineFlashError(f"cannot read the dataset {place}: datasets cannot be imported: {error}") from None
    try:
        if any((Path(place) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found: Any = datasets.load_from_disk(place)
        else:
            builder = datasets.load_dataset_builder(place)
            if builder.name == "webdataset":  # whose reader opens members by their ending, with torch too
                raise ImagineFlashError(
                    f"{place} is a set of tars; fetch them (hf download --repo-type dataset {place} --local-dir FOLDER) and "
                    "give --pictures FOLDER"
                )
            found = builder.as_streaming_dataset()
    except ImagineFlashError:
        raise
    except Exception as error:  # of many libraries: hub, network, parquet, scripts that nothing runs any more
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImagineFlashError(f"cannot read the dataset {place}: {reason}") from None
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) != 1:
        raise ImagineFlashError(f"{place} has the splits {', '.join(found)} and no 'train'; save the one you mean")
    return found["train"] if "train" in found else next(iter(found.values()))


def rows_of(dataset: Any, place: str, columns: tuple[str, str] | None) -> Iterator[tuple[str, Any, str]]:
    """(name, file or bytes, caption) of every row."""
    from datasets import Image

    picture, caption = columns_of(dataset.features or {}, place, columns)
    dataset = dataset.select_columns([picture, caption])
    if isinstance(dataset.features[picture], Image):
        dataset = dataset.cast_column(picture, Image(decode=False))  # one broken picture would end it all
    for place_in_set, row in enumerate(dataset):
        value, texts = row[picture], row[caption]
        if isinstance(value, dict):
            value = value.get("bytes") or _file(value.get("path"))
        text = next(iter(texts), "") if isinstance(texts, list) else texts  # several captions of one picture
        yield f"{place}, row {place_in_set}", value or b"", " ".join(str(text or "").split())


def _file(path: str | None) -> Path | bytes:
    """What a row names instead of holding it: a file here, or one of the hub's, perhaps inside of an archive there."""
    if not path or "hf://" not in path:
        return Path(path) if path else b""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()  # type: ignore[attr-defined]
    except OSError:
        return b""


def columns_of(features: dict[str, Any], place: str, columns: tuple[str, str] | None) -> tuple[str, str]:
    """The names of pictures and captions; ImagineFlashError that names the columns there are."""
    there = f"{place} has the columns {', '.join(features)}"
    if columns is not None:
        if unknown := [name for name in columns if name not in features]:
            raise ImagineFlashError(f"no column {unknown[0]!r}: {there}")
        if not isinstance(kind := features[columns[0]], dict) and not _holds_pictures(kind):
            raise ImagineFlashError(
                f"column {columns[0]!r} of {place} holds {getattr(kind, 'dtype', type(kind).__name__)}, no pictures; name a "
                "column of images, or fetch what it names and give the files as a folder or as WebDataset tars"
            )
        return columns
    pictures = [name for name, feature in features.items() if _holds_pictures(feature)]
    captions = [name for name in CAPTIONS if name in features]
    picture = "image" if "image" in pictures else pictures[0] if len(pictures) == 1 else None
    if picture is None or not captions:
        what = "captions" if picture else "pictures"
        raise ImagineFlashError(f"which column holds the {what}? {there}: give --columns PICTURE,CAPTION")
    return picture, captions[0]


def _holds_pictures(feature: Any) -> bool:
    """datasets' Image; or what it is stored as: bytes, with or without a path."""
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return type(feature).__name__ == "Image" or getattr(inner, "dtype", None) in ("binary", "large_binary")
