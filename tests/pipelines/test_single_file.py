"""A pipeline in one file, unpacked into the cache once, whoever else unpacks it at the time."""

import json
from pathlib import Path
from typing import Any

import pytest

from imagine_flash.pipelines import single_file


class Pipeline:
    """What diffusers would load: it is saved as its index alone."""

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        (folder / "model_index.json").write_text("saved")


def test_another_process_that_unpacked_it_first_is_no_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It happened that the slower of two refused to replace the folder, which "holds files but no manifest.json"."""
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))
    file, base = tmp_path / "mine.safetensors", tmp_path / "base"
    file.write_bytes(b"weights")
    base.mkdir()
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    other: list[Path | str] = []

    def load(*_: Any) -> Pipeline:
        monkeypatch.setattr(single_file, "_load", lambda *_: Pipeline())
        other.append(single_file.unpacked(file, base=str(base)))  # while this one still loads
        return Pipeline()

    monkeypatch.setattr(single_file, "_load", load)
    folder = single_file.unpacked(file, base=str(base))
    assert folder == other[0] and (Path(folder) / "model_index.json").read_text() == "saved"
