"""Tensors kept on disk are computed once, and again where something they depend on has changed or the file is damaged."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imagine_flash.distill.data.embeddings import Embeddings
from imagine_flash.distill.data.kept import kept
from imagine_flash.distill.memory import LiveBytes


def test_computed_once_and_again_for_another_identity_or_a_damaged_file(tmp_path: Path) -> None:
    path, calls = tmp_path / "new" / "text.safetensors", []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(len(calls))
        return {"a": torch.full((2,), float(len(calls)))}

    assert [kept(path, name, compute)["a"].tolist() for name in ("x", "x", "y", "y")] == [[1, 1]] * 2 + [[2, 2]] * 2
    path.write_bytes(path.read_bytes()[:20])
    assert kept(path, "y", compute)["a"].tolist() == [3, 3] and len(calls) == 3
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_computed_leaves_nothing(tmp_path: Path) -> None:
    def compute() -> dict[str, torch.Tensor]:
        raise ValueError("no pictures")

    with pytest.raises(ValueError, match="no pictures"):
        kept(tmp_path / "out.run/pictures.safetensors", "a", compute)
    assert not list(tmp_path.iterdir())


def test_embeddings_are_in_memory_once(tmp_path: Path) -> None:
    """Batches were joined at the end, which took twice the room of all: tens of gigabytes for two encoders' of 60,000 prompts."""
    count, shape = 64 * 20 + 1, (50, 20)
    model: Any = SimpleNamespace(
        tokens=lambda prompts: {"ids": torch.arange(len(prompts))},
        embed_tokens=lambda tokens: (tokens["ids"].float().view(-1, 1, 1).expand(-1, *shape),),
        stages=SimpleNamespace(conditions=("embeddings",), text_encoder=torch.nn.Identity()),
    )
    with LiveBytes() as live:
        text = Embeddings(model, [""] * count, tmp_path / "text.safetensors")
    assert live.peak < 1.3 * 2 * count * shape[0] * shape[1]
    (found,) = text[torch.tensor([0, 64, 999])]
    assert found.shape == (3, *shape) and found[:, 3, 7].tolist() == [0, 64, 999]
