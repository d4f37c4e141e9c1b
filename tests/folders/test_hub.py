"""Models by hub id, from a cache laid out as the hub's: contents in `blobs/`, links in `snapshots/`."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.folders.hub import local_folder
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.tests.commands import fails, run
from imagine_flash.tests.hub import REVISION, publish


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


def test_a_download_that_broke_off_can_be_repeated(hub: Path, tiny_artifact: Path) -> None:
    """It happened that the copy made of half the files was taken for the model from then on: "weights.bin is missing"."""
    snapshot = hub / "models--somebody--scenes/snapshots" / REVISION
    weights = (snapshot / "weights.bin").readlink()
    (snapshot / "weights.bin").unlink()
    assert local_folder("somebody/scenes", only=("model_index.json", "imagine_flash.json")) == snapshot
    with pytest.raises(ArtifactError, match=r"weights\.bin is missing"):
        read_artifact_manifest(local_folder("somebody/scenes"))
    (snapshot / "weights.bin").symlink_to(weights)
    assert read_artifact_manifest(local_folder("somebody/scenes")) == read_artifact_manifest(tiny_artifact)


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


@pytest.mark.parametrize(
    "name", ["./none", "../none", "~/none", ".none/none", "./none/none", "none/..", "-a--b/c", "a--b/c"]
)
def test_a_mistyped_path_is_one_line_and_never_asked_of_the_hub(hub: Path, name: str) -> None:
    """It happened that . and .. counted as owners of the hub, whose library raised an error of its own."""
    with pytest.raises(ArtifactError, match=r"(does not exist|there is no folder .*); check the path"):
        Engine.load(name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a cat", "--model", "./none/none"),
        ("generate", "a cat", "--lora", "./none"),
        ("export", "./none", "out"),
        ("serve", "--model", "./none/none"),
        ("serve", "--lora", "./none"),
        ("serve", "--lora", "ink=loras/none/ink.safetensors"),
        ("arena", "./none/none", "pictures", "--prompts", "prompts.txt"),
    ],
    ids=" ".join,
)
def test_nor_is_one_of_a_command(
    hub: Path, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happened that ./owner/name lost its ./ on the way, and that `serve` said its address before."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    Path("loras").mkdir()
    done = run(*arguments)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and not done.stdout, done
    assert line.startswith("error: ") and ("none does not exist; check the path" in line or "there is no" in line)
    assert "hub (" not in line
