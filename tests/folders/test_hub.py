"""Models by hub id, from a cache laid out as the hub's: contents in `blobs/`, links in `snapshots/`."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.folders.hub import local_folder
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.tests.commands import fails, run
from imagine_flash.tests.hub import publish


@pytest.fixture
def hub(tmp_path: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the tiny artifact as somebody/scenes."""
    publish(tmp_path / "hub", "somebody/scenes", tiny_artifact)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


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
    assert "\n" not in str(error.value) and f"copy it to {hub}/models--somebody--else" in str(error.value)


def test_the_commands_take_it_too(hub: Path, tmp_path: Path) -> None:
    """With the defaults of `generate`, which prefer a tiny decoder where a model of others has one."""
    done = run("generate", "a cat", "--model", "somebody/scenes", "--steps", "2", "-o", tmp_path / "cat.png")
    assert done.returncode == 0 and "decodes with" not in done.stderr, done.stderr
    said = fails("generate", "a cat", "--model", "somebody/scenes", "--tiny-decoder", "madebyollin/taesd")
    assert "was exported with its decoder" in said
