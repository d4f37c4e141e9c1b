"""What the backends that run an artifact's ONNX graphs on the host share: arrays are NumPy's, graphs are found by name."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ArtifactError
from ...folders.manifests import CONDITION_ENCODER, IMAGE_ENCODER, ModelDescription
from .base import Column, Fresh, LoraSet, Pictures, Stopped, stopwatch

Described = TypeVar("Described", bound=ModelDescription)
Run = Callable[[Sequence[NDArray[Any]]], list[NDArray[Any]]]  # inputs in the graph's order -> outputs


class GraphBackend(ABC, Generic[Described]):
    """One compiled graph per name and batch size, made by `prepare` or when it is first needed.

    A subclass that compiles for fixed batch sizes sets `batches`; a batch between two of them is padded with its last image.
    One that sets `splits` runs a batch above the last of them in parts.
    """

    name: str
    batches: tuple[int, ...] = ()  # increasing; empty where a graph takes any batch
    lone_plans: tuple[int, ...] = ()
    splits = False
    way_out = "export the student again"

    def __init__(self, folder: Path, manifest: Described) -> None:
        self.folder, self.manifest = folder, manifest
        self._graphs: dict[tuple[str, int], Run] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def open(self, graph: str, batch: int) -> Run:
        """Load one graph, for this batch size if `batches` says so, else 0. May raise whatever the library raises."""

    @abstractmethod
    def describe(self) -> str:
        """One line: library, device, precision, threads."""

    def stopwatch(self) -> Callable[[], Stopped]:
        return stopwatch()

    def prepare(self, graphs: Sequence[str], batches: Sequence[int] = (1,)) -> None:
        for graph in graphs:
            known = [min(batch, self.batches[-1]) for batch in batches] if self.splits else batches
            for batch in sorted({self._bucket(batch) for batch in known}):
                self._graph(graph, batch)

    @property
    def graph_names(self) -> Collection[str]:
        """What `open` knows."""
        return self.manifest.graph_names

    @property
    def most_rows(self) -> int | None:
        return self.batches[-1] if self.splits else None

    @property
    def loras(self) -> Mapping[str, frozenset[str]]:
        return {}

    def adapt(self, loras: LoraSet) -> None:
        assert not loras, "a backend without LoRAs"

    def upload(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values

    def join(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def encode(self, tokens: Mapping[str, NDArray[np.int64]]) -> tuple[NDArray[np.float32], ...]:
        """In parts where a prompt and its negative one are more than the largest batch."""
        ids = list(tokens.values())
        most = self.batches[-1] if self.batches else len(ids[0])
        if len(ids[0]) <= most:
            return tuple(self.run("text_encoder", ids))
        firsts = range(0, len(ids[0]), most)
        parts = [
            [1 * values for values in self.run("text_encoder", [one[i : i + most] for one in ids])] for i in firsts
        ]
        return tuple(map(self.join, zip(*parts, strict=True)))

    def encode_image(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.run(self.manifest.graph_name(IMAGE_ENCODER, (images.shape[1], images.shape[2])), [images])[0]

    def encode_condition(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        size = (pictures.shape[1], pictures.shape[2])
        return tuple(self.run(self.manifest.graph_name(CONDITION_ENCODER, size), [pictures]))

    def denoise(
        self, x: NDArray[np.float32], timestep: NDArray[np.float32], conditions: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        return self.run(self._at_size("denoiser", x), [x, timestep, *conditions])[0]

    def update(
        self, x: NDArray[np.float32], m: NDArray[np.float32], a: Column, b: Column, fresh: Fresh = None
    ) -> NDArray[np.float32]:
        rows = (-1, *(1,) * (x.ndim - 1))
        updated: NDArray[np.float32] = a.reshape(rows) * x
        updated += b.reshape(rows) * m
        if fresh is not None:
            updated += fresh[0].reshape(rows) * fresh[1]
        return updated

    def finite(self, x: NDArray[np.float32]) -> NDArray[np.bool_]:
        return np.asarray(np.isfinite(x).all(axis=tuple(range(1, x.ndim))))

    def decode(self, x: NDArray[np.float32]) -> Pictures:
        return self.pictures(self.run(self._at_size("decoder", x), [x]), x)

    def sample(self, graph: str, inputs: Sequence[NDArray[Any]], *noises: NDArray[np.float32]) -> Pictures:
        return self.pictures(self.run(self._at_size(graph, noises[0]), [*inputs, *noises]), noises[0])

    def pictures(self, outputs: Sequence[Any], x: Any) -> Pictures:
        """Images and which are finite. Older artifacts don't say: there x tells, and black, which NaN becomes in bytes."""
        images, *told = outputs
        if told:
            return images, told[0]
        return images, self.finite(x) & images.reshape(len(images), -1).any(axis=1)

    def close(self) -> None:
        self._graphs.clear()

    def run(self, graph: str, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs of a graph; padded rows are dropped. Raises ArtifactError with the library's reason."""
        rows = len(inputs[0])
        if self.splits and rows > self.batches[-1]:
            firsts = range(0, rows, self.batches[-1])
            parts = [self.run(graph, [values[i : i + self.batches[-1]] for values in inputs]) for i in firsts]
            return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
        bucket = self._bucket(rows)
        run = self._graph(graph, bucket)
        if bucket > rows:
            inputs = [np.concatenate([values, np.repeat(values[-1:], bucket - rows, axis=0)]) for values in inputs]
        try:
            outputs = run(inputs)
        except Exception as error:  # the libraries' errors share no base of their own
            raise self._broken(graph, error) from None
        return [values[:rows] for values in outputs] if bucket > rows else outputs

    def _bucket(self, rows: int) -> int:
        """The smallest compiled batch that holds so many rows; 0 where any batch does."""
        if not self.batches:
            return 0
        if rows > self.batches[-1]:
            raise ArtifactError(f"a batch of {rows} is more than this engine was loaded for ({self.batches[-1]})")
        return next(batch for batch in self.batches if batch >= rows)

    def _at_size(self, kind: str, latents: NDArray[np.float32]) -> str:
        """The graph for latents of this height and width."""
        scale = self.manifest.downscale
        return self.manifest.graph_name(kind, (latents.shape[2] * scale, latents.shape[3] * scale))

    def _graph(self, graph: str, batch: int) -> Run:
        found = self._graphs.get((graph, batch))
        if found is not None:
            return found
        with self._lock:
            if (graph, batch) not in self._graphs:
                if graph not in self.graph_names:
                    raise ArtifactError(f"{self.folder} has no graph {graph!r}; export the student again")
                try:
                    self._graphs[graph, batch] = self.open(graph, batch)
                except Exception as error:
                    raise self._broken(graph, error) from None
            return self._graphs[graph, batch]

    def _broken(self, graph: str, error: Exception) -> ArtifactError:
        if isinstance(error, ArtifactError):
            return error
        reason = " ".join(str(error).split())[:300]
        return ArtifactError(f"{self.name} cannot run {graph} of {self.folder} ({reason}); {self.way_out}")
