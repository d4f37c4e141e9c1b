"""Tensors kept on disk are computed once, and again where something they depend on has changed or the file is damaged."""

from pathlib import Path

import pytest
import torch

from imagine_flash.distill.data.kept import kept


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
