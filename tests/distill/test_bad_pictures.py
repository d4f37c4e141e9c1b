"""What is wrong with a set of pictures is one line, before any update."""

import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from rich.console import Console

from imagine_flash.core.errors import ImagineFlashError, RecipeError
from imagine_flash.distill.data.captioned import PictureSource, picture_source
from imagine_flash.distill.data.columns import loaded
from imagine_flash.distill.data.pictures import _opaque, picture_set
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import Model, load_model
from imagine_flash.distill.recipe import TeacherRecipe
from imagine_flash.distill.student import distill
from imagine_flash.distill.teacher import train_teacher
from imagine_flash.tests.commands import fails
from imagine_flash.tests.distill.picture_sets import FIT, RECIPE, image_folder, picture, saved_dataset, shard
from imagine_flash.tests.pipelines import CAPTIONS


def make_bad(kind: str, place: Path) -> str:
    """A set that is wrong in one way; what the command is given."""
    if kind == "empty":
        place.mkdir()
    elif kind == "broken":
        image_folder(place, ".txt")
        for path in place.glob("*.png"):
            path.write_bytes(b"")
    elif kind == "silent":
        image_folder(place, "none")
    elif kind == "few":
        image_folder(place, ".txt", CAPTIONS[:1])
    elif kind == "keys":
        image_folder(place, "none")
        (place / "metadata.jsonl").write_text('{"file_name": "0.png", "txet": "a fox"}')
    elif kind == "json":
        image_folder(place, "none")
        (place / "metadata.jsonl").write_text("{")
    elif kind == "outside":
        image_folder(place, "none")
        (place / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "a fox"}')
    elif kind in ("root", "up"):
        image_folder(place, "none")
        name = str(place / "0.png") if kind == "root" else "a/../.."
        (place / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a fox"}))
    elif kind == "urls":
        place.mkdir()
        rows = [{"url": f"http://x/{i}.jpg", "text": text} for i, text in enumerate(CAPTIONS)]
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(place / "train.parquet")
    elif kind == "tar":
        shard(place / "0.tar", {"0.png": picture(0), "0.txt": b"a fox"})
        (place / "0.tar").write_bytes((place / "0.tar").read_bytes()[:700])
    elif kind == "latin":
        image_folder(place, "none")
        (place / "0.txt").write_bytes("ein Löwe".encode("latin-1"))
    elif kind == "columns":
        saved_dataset(place, "parquet")
    elif kind == "script":
        place.mkdir()
        (place / f"{place.name}.py").write_text("raise SystemExit('this code ran')")
        (place / "train.parquet").write_bytes(b"PAR1")
    return str(place)


def test_a_library_that_cannot_be_imported_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow 26 with NumPy 1 was answered with "pip install datasets", which was there."""
    (tmp_path / "datasets.py").write_text('raise ImportError("pyarrow requires NumPy 2.0 or newer")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(ImagineFlashError, match=r"^cannot read the dataset x: datasets cannot be imported: pyarrow"):
        loaded("x")


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("nowhere", [], "no pictures at"),
        ("empty", [], "give a folder of .jpg"),
        ("broken", [], "none of them is of use (5 cannot be read"),
        ("silent", [], "none of them is of use (5 have no readable caption"),
        ("few", [], "has 1 pictures of use, fewer than fit.batch 2"),
        ("keys", [], "has no 'text' or 'caption' or 'prompt'; did you mean 'txet'?; it has file_name, txet"),
        ("json", [], "cannot read"),
        ("outside", [], "must name a file of this folder, got '../secret.png'"),
        ("root", [], "must name a file of this folder, got '/"),
        ("up", [], "must name a file of this folder, got 'a/../..'"),
        ("tar", [], "0.tar (unexpected end of data); fetch it again"),
        ("latin", [], "none of them is of use (5 have no readable caption"),
        ("columns", ["--columns", "image,words"], "no column 'words': "),
        ("columns", ["--columns", "image"], "must be PICTURE,CAPTION"),
        (
            "urls",
            ["--columns", "url,text"],
            "holds string, no pictures; name a column of images, or fetch what it names",
        ),
        ("script", [], "cannot read the dataset"),
    ],
)
def test_bad_sets(kind: str, more: list[str], says: str, teacher: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    place = make_bad(kind, tmp_path / "set")
    line = fails("distill", teacher, tmp_path / "out", "--recipe", recipe, "--pictures", place, *more)
    assert says in line and "this code ran" not in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run" / "checkpoints").exists()


def test_recipe_and_data_that_do_not_belong_together(teacher: Path, tmp_path: Path) -> None:
    source, plain = PictureSource(place=str(tmp_path)), distill_recipe({"fit": FIT})
    with pytest.raises(RecipeError, match="needs no pictures"):
        distill(teacher, tmp_path / "out", plain, pictures=source)
    with pytest.raises(RecipeError, match="leave out --prompts or --pictures"):
        distill(teacher, tmp_path / "out", distill_recipe(RECIPE), pictures=source, prompts=["a cat"])
    with pytest.raises(ImagineFlashError, match="give them by --pictures"):
        picture_source(None, buckets=True)


def test_a_batch_that_cannot_be_split_is_refused_before_anything_is_encoded(teacher: Path, tmp_path: Path) -> None:
    """It was found by the first update, after hours of encoding."""
    source = PictureSource(place=str(image_folder(tmp_path / "set", ".txt")))
    recipe = distill_recipe({**RECIPE, "fit": {**FIT, "accumulate": 3}})
    with pytest.raises(RecipeError, match="batch 2 cannot be split into 3 equal parts"):
        distill(teacher, tmp_path / "out", recipe, pictures=source)
    whole, split = FIT, {**FIT, "accumulate": 3}
    for fits, start in (((split, whole), None), ((whole, split), None), ((split, whole), teacher)):
        bad = TeacherRecipe.model_validate({"fit": fits[0], "autoencoder": {"fit": fits[1]}})
        with pytest.raises(RecipeError, match="batch 2 cannot be split into 3 equal parts"):
            train_teacher(bad, tmp_path / "out", start=start)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.fixture(scope="module")
def model(teacher: Path) -> Model:
    return load_model(teacher)


def encoded(model: Model, folder: Path, *, buckets: bool = False) -> tuple[list[torch.Tensor], str]:
    """The latents of a folder, and what was said."""
    said, source = io.StringIO(), PictureSource(place=str(folder), buckets=buckets)
    console = Console(file=said, width=1000)
    found = picture_set(model, source, folder.with_name("kept"), most=9, console=console)
    return found.latents, said.getvalue()


def captions_of(place: Path) -> list[str]:
    return [each.caption for each in PictureSource(place=str(place))]


def numbers(kind: str) -> bytes:
    """A grey picture, all of one value, as 16 bits or as floating-point numbers; a TIFF where PNG has no such kind."""
    file, value = io.BytesIO(), np.full((64, 64), 0.5 if kind == "F" else 128 * 257)
    image = Image.fromarray(value.astype(np.float32 if kind == "F" else np.uint16))
    assert image.mode == kind
    image.save(file, "TIFF" if kind == "F" else "PNG")
    return file.getvalue()


def test_grey_of_16_bits_is_no_white_and_floating_point_is_left_out(model: Model, tmp_path: Path) -> None:
    """16 bits were cut off at 255, so that students learned white pictures, silently."""
    folder = image_folder(tmp_path / "set", "none", ())
    for i, data in enumerate((numbers("I;16"), numbers("F"))):
        (folder / f"{i}.png").write_bytes(data)
        (folder / f"{i}.txt").write_text("grey")
    (latents,), said = encoded(model, folder)
    grey = model.stages.image_encoder(torch.full((1, 64, 64, 3), 128, dtype=torch.uint8))
    torch.testing.assert_close(latents.float(), grey, atol=2e-3, rtol=1e-2)
    assert f"left out: 1 cannot be read: {folder}/1.png (floating-point numbers, no colours)" in said


def test_what_is_transparent_in_grey_of_16_bits_is_white() -> None:
    image = Image.fromarray(np.full((2, 2), 3 * 257, np.uint16))
    image.info["transparency"] = 3 * 257
    assert np.asarray(_opaque(image)).min() == 255
    del image.info["transparency"]
    assert np.asarray(_opaque(image)).max() == 3


ODD = {  # an IFD's entries: tag, type, count, value
    "a unit as text": ((0x112, 3, 1, b"\6\0"), (0x128, 2, 3, b"in")),
    "a resolution as text": ((0x112, 3, 1, b"\6\0"), (0x11A, 2, 3, b"72")),
    "a width as a fraction": ((0x112, 3, 1, b"\6\0"), (0x100, 11, 1, struct.pack("<f", float("nan")))),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_exif_is_passed_over(kind: str, model: Model, tmp_path: Path) -> None:
    """One such picture ended the whole set with a traceback, since Pillow wrote its EXIF data anew. It is turned all the same."""
    folder, entries = image_folder(tmp_path / "set", "none", ()), ODD[kind]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    exif += b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255  # its middle, white
    Image.fromarray(wide.transpose(1, 0, 2)).save(folder / "0.jpg", exif=exif, quality=100)
    with Image.open(folder / "0.jpg") as image, pytest.raises((TypeError, struct.error)):
        ImageOps.exif_transpose(image)
    (folder / "0.txt").write_text("white")
    (latents,), said = encoded(model, folder, buckets=True)
    assert latents.shape[-1] > latents.shape[-2] and "left out" not in said


def test_a_picture_that_no_reader_foresees_is_left_out_and_said(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Readers raise struct.error and worse for damaged bytes; only four kinds of errors were expected."""
    folder, load = image_folder(tmp_path / "set", ".txt"), Image.open

    def opened(file: io.BytesIO) -> Image.Image:
        if file.getvalue() == b"odd":
            raise struct.error
        return load(file)

    monkeypatch.setattr(Image, "open", opened)
    (folder / "1.png").write_bytes(b"odd")
    (latents,), said = encoded(model, folder)
    assert len(latents) == len(CAPTIONS) - 1 and f"left out: 1 cannot be read: {folder}/1.png (error)" in said


def test_a_row_without_the_captions_key_is_left_out(model: Model, tmp_path: Path) -> None:
    """One of them anywhere ended the whole set. In a sample whose .txt is empty the .json is looked at."""
    folder = image_folder(tmp_path / "set", "metadata.jsonl")
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join([rows[0], '{"file_name": "1.png"}', rows[2]]))
    assert captions_of(folder) == [CAPTIONS[0], "", CAPTIONS[2]]
    _, said = encoded(model, folder)
    assert f"left out: 1 have no readable caption: {folder}/1.png" in said
    members: dict[str, bytes] = {}
    for i, text in enumerate((b'{"caption": "a"}', b'{"url": "x"}', b"null", b'{"caption": "d"}')):
        members |= {f"{i}.png": picture(i), f"{i}.json": text}
    assert captions_of(shard(tmp_path / "0.tar", members)) == ["a", "", "", "d"]
    first = {"0.png": picture(0), "0.txt": b"a", "1.png": picture(1), "1.txt": b" ", "1.json": b'{"url": "x"}'}
    assert captions_of(shard(tmp_path / "1.tar", first)) == ["a", ""]
