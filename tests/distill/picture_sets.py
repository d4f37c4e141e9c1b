"""Small sets of pictures with captions, of every kind that is read: real files; a module like toy.py."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from imagine_flash.tests.pipelines import CAPTIONS

FIT = {"steps": 2, "batch": 2, "schedule": "constant", "warmup": 0, "preview_every": 0}
RECIPE = {"plans": {1: [999]}, "teacher_steps": 1, "adversarial": {"ramp": 0}, "fit": FIT}
COLOURS = ((250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 20), (20, 20, 20))


def picture(i: int, size: tuple[int, int] = (80, 64), kind: str = "PNG") -> bytes:
    """One colour, width x height."""
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[i]).save(file, kind)
    return file.getvalue()


def image_folder(place: Path, kind: str, names: tuple[str, ...] = CAPTIONS) -> Path:
    """Pictures 0.png, 1.png, ... with their captions in `kind`: metadata.jsonl, metadata.csv or .txt."""
    place.mkdir(parents=True)
    for i, caption in enumerate(names):
        (place / f"{i}.png").write_bytes(picture(i))
        if kind == ".txt":
            (place / f"{i}.txt").write_text(caption + "\n")
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(names)]
    if kind == "metadata.jsonl":
        (place / kind).write_text("\n".join(map(json.dumps, rows)) + "\n")
    if kind == "metadata.parquet":
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(place / kind)
    if kind == "metadata.csv":
        (place / kind).write_text("file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in rows))
    return place


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def web_dataset(place: Path) -> Path:
    """Two shards: captions in .txt and in .json, pictures of three formats, and a pickle that nobody may open."""
    first = {
        "a.jpg": picture(0, kind="JPEG"),
        "a.txt": CAPTIONS[0].encode(),
        "b.png": picture(1),
        "b.pkl": b"no pickle",
    }
    shard(place / "00.tar", first | {"b.json": json.dumps({"caption": CAPTIONS[1], "url": None}).encode()})
    rest = {
        f"x/{i}.{ending}": data
        for i in (2, 3, 4)
        for ending, data in (("webp", picture(i, kind="WEBP")), ("txt", CAPTIONS[i].encode()), ("pth", b"no pickle"))
    }
    shard(place / "01.tar", rest)
    return place


def saved_dataset(place: Path, kind: str) -> Path:
    """Written by the library: its own folder, or a parquet file as the hub holds it."""
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": picture(i), "path": None} for i in range(len(CAPTIONS))]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": images, "text": list(CAPTIONS)}, features=features)
    if kind == "saved":
        made.save_to_disk(str(place))
    else:
        place.mkdir()
        made.to_parquet(place / "train-00000-of-00001.parquet")
    return place
