"""The best weights of a training by a figure of its own, and when to stop looking for better ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import ArtifactError
from .sharding import part_like, whole
from .tensors import write_tensors


class Best:
    """Keeps in `path` the weights at which the first figure of a validation was least.

    patience: updates without a better one after which the training may end; 0: never. A resumed run knows what was found.
    """

    def __init__(self, path: Path, fingerprint: str, patience: int) -> None:
        self.path, self.fingerprint, self.patience = path, fingerprint, patience
        self.step, self.value = 0, float("inf")
        if path.exists():
            self._read()

    def offer(
        self, figures: Mapping[str, float], step: int, weights: Sequence[torch.Tensor], *, write: bool = True
    ) -> None:
        """The figures of `weights` after `step` updates; a value that is not finite is never the best."""
        value = next(iter(figures.values()))
        if not value < self.value:
            return
        self.step, self.value = step, value
        gathered = (whole(weight.detach()) for weight in weights)  # by every process
        tensors = {str(i): weight.cpu().contiguous() for i, weight in enumerate(gathered) if write}
        if not write:
            return
        metadata = {"fingerprint": self.fingerprint, "step": str(step), "value": repr(value)}
        write_tensors(self.path, tensors, metadata)

    def exhausted(self, step: int) -> bool:
        """Whether the last `patience` updates brought nothing better."""
        return bool(self.step) and 0 < self.patience <= step - self.step

    @torch.no_grad()
    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        """Put the best ones in place, where any were kept. ArtifactError where this process cannot read them."""
        if not self.step:
            return
        try:
            with safe_open(str(self.path), "pt") as file:
                for i, weight in enumerate(weights):
                    weight.copy_(part_like(file.get_tensor(str(i)), weight))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"cannot read the best weights, {self.path} ({error}); several processes need an OUT.run that all of them see: "
                "put it there and start the same command again"
            ) from None

    def _read(self) -> None:
        """What an earlier sitting found; a file of another run or a damaged one counts as none."""
        try:
            with safe_open(str(self.path), "pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError):
            return
        if metadata.get("fingerprint") == self.fingerprint:
            self.step, self.value = int(metadata["step"]), float(metadata["value"])
