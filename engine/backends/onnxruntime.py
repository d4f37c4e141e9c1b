"""The graphs on onnxruntime's CPU provider."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...core.artifact import ArtifactManifest
from ...core.errors import ArtifactError, missing_extra

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class OnnxruntimeBackend:
    """One session per graph, made by `prepare` or when it is first needed."""

    name = "onnxruntime"

    def __init__(self, folder: Path, manifest: ArtifactManifest) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "cpu") from None
        self._library: Any = onnxruntime
        self._folder, self._manifest = folder, manifest
        self._sessions: dict[str, InferenceSession] = {}
        self._lock = threading.Lock()

    def prepare(self, graphs: Sequence[str]) -> None:
        for graph in graphs:
            self._session(graph)

    def encode(self, tokens: Mapping[str, NDArray[np.int64]]) -> tuple[NDArray[np.float32], ...]:
        return tuple(self._run("text_encoder", tokens))

    def denoise(
        self, latents: NDArray[np.float32], timestep: NDArray[np.float32], conditions: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        graph = self._at_size("denoiser", latents)
        names = [spec.name for spec in self._manifest.graphs[graph].inputs]
        return self._run(graph, dict(zip(names, (latents, timestep, *conditions), strict=True)))[0]

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self._run(self._at_size("decoder", latents), {"latents": latents})[0]

    def sample(
        self, steps: int, tokens: Mapping[str, NDArray[np.int64]], noise: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        return self._run(self._at_size(f"sampler_{steps}", noise), {**tokens, "noise": noise})[0]

    def _at_size(self, kind: str, latents: NDArray[np.float32]) -> str:
        """The graph for latents of this height and width."""
        scale = self._manifest.downscale
        return self._manifest.graph_name(kind, (latents.shape[2] * scale, latents.shape[3] * scale))

    def _run(self, graph: str, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        session = self._session(graph)
        try:
            return [np.asarray(value) for value in session.run(None, dict(feed))]
        except Exception as error:
            raise self._broken(graph, error) from None

    def _session(self, graph: str) -> InferenceSession:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = self._open(graph)
            return self._sessions[graph]

    def _open(self, graph: str) -> InferenceSession:
        if graph not in self._manifest.graphs:
            raise ArtifactError(f"the artifact has no graph {graph!r}; export the student again")
        options = self._library.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_reuse = False  # planning reuse takes five sixths of loading an unrolled graph: decision 004
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others use these cores too
        try:
            path = self._folder / self._manifest.graphs[graph].file
            return self._library.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors share no base of their own
            raise self._broken(graph, error) from None

    def _broken(self, graph: str, error: Exception) -> ArtifactError:
        reason = " ".join(str(error).split())[:300]
        return ArtifactError(f"onnxruntime cannot run {graph} of {self._folder} ({reason}); export the student again")
