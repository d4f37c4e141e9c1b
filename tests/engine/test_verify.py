"""The reference pictures of an artifact: drawn again here, and a difference is found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagine_flash.core.errors import ArtifactError
from imagine_flash.engine import Engine
from imagine_flash.folders.files import sha256_file
from imagine_flash.folders.manifests import ArtifactManifest
from imagine_flash.folders.reading import write_manifest


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def rewrite(folder: Path, **changes: object) -> None:
    manifest = Engine.load(folder).artifact
    files = {name: sha256_file(folder / name) for name in manifest.files}
    write_manifest(folder, ArtifactManifest.model_validate(manifest.model_dump() | {"files": files} | changes))


@pytest.mark.parametrize("route", ["stages", "sampler"])
def test_this_machine_draws_what_torch_drew(tiny_artifact: Path, route) -> None:
    found = list(Engine.load(tiny_artifact, route=route).verify())
    assert [one.reference.steps for one in found] == [1, 2, 3]
    assert all(one.passed and one.levels <= 1 and one.psnr > 50 for one in found)


def test_sizes_that_an_engine_was_not_loaded_for_are_left_out(two_sizes: Path) -> None:
    engine = Engine.load(two_sizes, sizes=[(64, 128)], backend="onnxruntime")
    references = engine.artifact.references
    assert [one.reference for one in engine.verify()] == [one for one in references if one.size == (64, 128)]


def test_another_picture_is_found(copy: Path) -> None:
    file = copy / "references/64x64_2.png"
    pixels = np.asarray(Image.open(file)).copy()
    pixels[:8] = 255 - pixels[:8]
    engine = Engine.load(copy)
    Image.fromarray(pixels).save(file)
    assert [one.passed for one in engine.verify()] == [True, False, True]


@pytest.mark.parametrize("damage", ["none listed", "another size", "no picture"])
def test_pictures_that_cannot_be_compared(damage: str, copy: Path) -> None:
    engine = Engine.load(copy)
    file = copy / "references/64x64_1.png"
    if damage == "none listed":
        rewrite(copy, references=[])
        engine = Engine.load(copy)
    elif damage == "another size":
        Image.new("RGB", (32, 64)).save(file)
    else:
        file.write_bytes(b"not a picture")
    says = {"none listed": "holds no reference pictures", "another size": "has the size", "no picture": "cannot read"}
    with pytest.raises(ArtifactError, match=says[damage]):
        list(engine.verify())
