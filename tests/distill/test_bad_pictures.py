"""What is wrong with a set of pictures is one line, before any update."""

import json
import sys
from pathlib import Path

import pytest

from imagine_flash.core.errors import ImagineFlashError, RecipeError
from imagine_flash.distill.data.captioned import PictureSource, picture_source
from imagine_flash.distill.data.columns import loaded
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.student import distill
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
        ("tar", [], "0.tar (unexpected end of data); fetch it again"),
        ("latin", [], "none of them is of use (5 have no readable caption"),
        ("columns", ["--columns", "image,words"], "no column 'words': "),
        ("columns", ["--columns", "image"], "must be PICTURE,CAPTION"),
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
