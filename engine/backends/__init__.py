"""What an engine needs of a backend, and which ones there are. Each is imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.artifact import ArtifactManifest
from ...core.errors import ArtifactError, nearest

BACKENDS = ("onnxruntime",)


class Backend(Protocol):
    """The graphs of an artifact as functions of arrays. Every method may be called from several threads."""

    name: str

    def prepare(self, graphs: Sequence[str]) -> None:
        """Load these graphs now, so that the first request does not wait for them."""
        ...

    def encode(self, tokens: Mapping[str, NDArray[np.int64]]) -> tuple[NDArray[np.float32], ...]:
        """Token ids and masks (B, L) by input name -> the conditions of the denoiser, each (B, ...)."""
        ...

    def denoise(
        self, latents: NDArray[np.float32], timestep: NDArray[np.float32], conditions: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """latents (B, C, h, w), timestep (B,), conditions (B, ...) -> the network's output m (B, C, h, w)."""
        ...

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """latents (B, C, h, w) -> images (B, H, W, 3)."""
        ...

    def sample(
        self, steps: int, tokens: Mapping[str, NDArray[np.int64]], noise: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """The whole sampler of `steps` steps in one call: tokens (B, L) and x_T (B, C, h, w) -> images (B, H, W, 3)."""
        ...


def load_backend(name: str, folder: Path, manifest: ArtifactManifest) -> Backend:
    """The backend called `name`; "auto" takes the fastest one installed. Raises ArtifactError, MissingExtraError."""
    if name not in ("auto", *BACKENDS):
        raise ArtifactError(f"no backend {name!r}{nearest(name, BACKENDS)}; known: auto, {', '.join(BACKENDS)}")
    from .onnxruntime import OnnxruntimeBackend

    return OnnxruntimeBackend(folder, manifest)
