"""Repositories that hold their weights in several precisions: one of them is fetched, found whole and drawn with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from imagine_flash.models import student as students
from imagine_flash.models.files import missing_files, missing_pieces
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.pipelines import loading
from imagine_flash.pipelines.half import stored_dtype
from imagine_flash.pipelines.loading import load_pipeline
from imagine_flash.tests import pipelines

PIECES = {"max_shard_size": "20KB"}
SAVED: dict[
    str, tuple[dict[str, Any], dict[str, Any]]
] = {  # how the full weights are saved, and how those in half precision
    "pieces of both": (PIECES, PIECES),
    "pieces of full ones": (PIECES, {}),
    "pieces of half ones": ({}, PIECES),
}


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was fetched of the repository in repo/, into snapshot/, by the hub's own patterns."""
    found: list[str] = []

    def local_folder(name: str | Path, *, ignore: Sequence[str] = (), only: Sequence[str] | None = None) -> Path:
        if Path(name).exists():
            return Path(name)
        names = [path.relative_to(tmp_path / "repo").as_posix() for path in (tmp_path / "repo").rglob("*.*")]
        for file in filter_repo_objects(
            names, allow_patterns=None if only is None else list(only), ignore_patterns=list(ignore)
        ):
            target = tmp_path / "snapshot" / file
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(tmp_path / "repo" / file)
                found.append(file)
        return tmp_path / "snapshot"

    for module in (students, loading):
        monkeypatch.setattr(module, "local_folder", local_folder)
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))
    return found


@pytest.mark.parametrize("kind", SAVED)
def test_one_precision_is_fetched_and_loads(kind: str, tmp_path: Path, fetched: list[str]) -> None:
    """stable-diffusion-3.5-large has T5 as pieces in both: whichever index came first was asked for, and T5 fetched twice."""
    pipeline = pipelines.build_pipeline()
    pipeline.save_pretrained(tmp_path / "repo")
    encoder = tmp_path / "repo" / "text_encoder"
    (encoder / "model.safetensors").unlink()
    full, half = SAVED[kind]
    pipeline.text_encoder.save_pretrained(encoder, **full)
    pipeline.text_encoder.half().save_pretrained(encoder, variant="fp16", **half)
    student = student_of("somebody/model", ModelOptions(steps=(1,), sampler="deterministic"))
    weights = [name for name in fetched if name.startswith("text_encoder/") and name.endswith(".safetensors")]
    assert weights and all("fp16" in name for name in weights)
    assert stored_dtype(student / "text_encoder") == torch.float16
    loaded, expected = (one.text_encoder.state_dict() for one in (load_pipeline(student), pipeline))
    assert all(torch.equal(values, expected[name].float()) for name, values in loaded.items())


ASKED: dict[str, Any] = {
    "as it says itself": ModelOptions(steps=(1,), sampler="deterministic"),
    "as a network of the catalogue": ModelOptions(entry="sdxl-lightning-4step"),
}


@pytest.mark.parametrize("way", [*ASKED, "to load"])
def test_whole_checkpoints_beside_a_pipeline_are_left_out(way: str, tmp_path: Path, fetched: list[str]) -> None:
    """Of pipelines that the catalogue does not have they were fetched, and never read: 24 GB of FLUX.1-dev."""
    pipelines.build_pipeline().save_pretrained(tmp_path / "repo")
    (tmp_path / "repo" / "whole.safetensors").touch()
    if way == "to load":
        load_pipeline("somebody/model")
    else:
        student_of("somebody/model", ASKED[way])
    assert "unet/diffusion_pytorch_model.safetensors" in fetched and "whole.safetensors" not in fetched


def test_a_student_of_ours_is_fetched_with_its_lora(tmp_path: Path, fetched: list[str]) -> None:
    pipelines.build_student(tmp_path / "repo")
    (tmp_path / "repo" / "pytorch_lora_weights.safetensors").touch()
    student_of("somebody/model")
    assert "pytorch_lora_weights.safetensors" in fetched


@pytest.mark.parametrize("piece", ["parts/0.safetensors", ""])
def test_an_index_may_name_anything(piece: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": piece}}))
    assert missing_pieces(index) == [Path(piece).name or tmp_path.name]


def test_pieces_that_no_index_has_all_of_are_missing(tmp_path: Path) -> None:
    pipeline = pipelines.build_pipeline()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    for variant in (None, "fp16"):
        pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder", variant=variant, **PIECES)
    assert missing_files(tmp_path) == []
    next((tmp_path / "text_encoder").glob("model-00001*")).unlink()
    assert missing_files(tmp_path) == []
    gone = next((tmp_path / "text_encoder").glob("model.fp16-00001*"))
    gone.unlink()
    assert missing_files(tmp_path) == [f"text_encoder/{gone.name}"]
