"""Files of tensors of a run: written whole or not at all, and what a killed writer left of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..core.errors import ArtifactError
from ..folders.files import atomic_file

_UNFINISHED = (".tmp*", ".*.tmp-*")  # safetensors' own, and those of atomic_file


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, which replaces an older one in one rename. ArtifactError where it cannot be written, on a full disk
    for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, str(temporary), metadata=dict(metadata))
    except (SafetensorError, OSError) as error:  # the first is no OSError
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"cannot write {path} ({reason}); make room on its disk and start the same command again"
        ) from None


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left in a run's folder: each as large as a checkpoint may be, and nobody reads it."""
    for place in (folder, folder / "checkpoints", folder / "previews"):
        for path in {path for pattern in _UNFINISHED for path in place.glob(pattern) if path.is_file()}:
            path.unlink(missing_ok=True)
