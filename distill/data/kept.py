"""Tensors that take long to compute, kept on disk: computed again only where something they depend on has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..tensors import write_tensors


def kept(path: Path, identity: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `compute` gives, by name, read from `path` (safetensors) where that was written with the same `identity`. ArtifactError
    where it cannot be written."""
    if _identity(path) != identity:
        tensors = {name: tensor.contiguous() for name, tensor in compute().items()}  # may fail: nothing is left then
        write_tensors(path, tensors, {"identity": identity})
        del tensors  # of large sets there is no room for two
    return load_file(str(path))


def _identity(path: Path) -> str | None:
    """None where there is no file, or one that is damaged or of somebody else."""
    try:
        with safe_open(str(path), "pt") as file:
            return (file.metadata() or {}).get("identity")
    except (SafetensorError, OSError):
        return None
