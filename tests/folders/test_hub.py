"""Models by hub id, from a cache laid out as the hub's: contents in `blobs/`, links in `snapshots/`."""

import hashlib
from pathlib import Path

import huggingface_hub.constants
import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.folders.hub import local_folder
from imagine_flash.folders.reading import read_artifact_manifest

REVISION = "a" * 40


@pytest.fixture
def hub(tmp_path: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the tiny artifact as somebody/scenes."""
    cache = tmp_path / "hub"
    repository = cache / "models--somebody--scenes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "blobs").mkdir()
    for path in tiny_artifact.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = repository / "snapshots" / REVISION / path.relative_to(tiny_artifact)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_artifact_of_the_hub_draws(hub: Path, tiny_artifact: Path, backend: str) -> None:
    """It happened that OpenVINO, which "auto" takes, called the weights outside the folder."""
    request = GenerateRequest(prompt="a cat", seed=1, steps=2)
    with (
        Engine.load("somebody/scenes", backend=backend) as engine,
        Engine.load(tiny_artifact, backend=backend) as other,
    ):
        assert (engine.generate(request).images == other.generate(request).images).all()


def test_its_files_are_not_stored_twice(hub: Path) -> None:
    folder = local_folder("somebody/scenes")
    weights = folder / "weights.bin"
    assert not weights.is_symlink() and weights.stat().st_nlink == 2
    assert local_folder("somebody/scenes") == folder and read_artifact_manifest(folder)


def test_what_is_not_there_is_one_line(hub: Path) -> None:
    with pytest.raises(ArtifactError, match="somebody/else is no folder here and could not be fetched") as error:
        local_folder("somebody/else")
    assert "\n" not in str(error.value)
