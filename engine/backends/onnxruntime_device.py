"""The graphs on onnxruntime's CUDA or TensorRT provider, never run by the project: latents, conditions and what the networks give
stay on the device.

A graph of fixed sizes is loaded once for each batch size: of a free one, onnxruntime computes shapes on the processor, and the
embedded denoiser then has 90 copies to and from the device in it. It is bound to static arrays, captured as a CUDA graph in the
first call by the thread that draws, and replayed from then on. A graph of any size is bound anew in each call. Each call waits for
the device at its end, so that sessions, which have a stream of their own each, never overtake one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from ...core.errors import ArtifactError
from ...folders.manifests import ArtifactManifest
from .base import BackendOptions, Column, Fresh, LoraSet, Pictures
from .onnxruntime import OnnxruntimeBackend
from .onnxruntime_arrays import Device, DeviceArray
from .onnxruntime_providers import NVIDIA, PROVIDERS, load_cuda, numbered, uncaptured

UPDATE = "ax = Mul(a, x) bm = Mul(b, m) out = Add(ax, bm)"
RENOISED = "ax = Mul(a, x) bm = Mul(b, m) mean = Add(ax, bm) cz = Mul(c, z) out = Add(mean, cz)"
MIXED = 1024  # combinations of steps in one batch whose coefficients stay on the device
CAPTURED, UNCAPTURED = "1", "-1"  # of onnxruntime's CUDA graphs of a session; 0 is its own

Answers = list[DeviceArray]


@dataclass(frozen=True, eq=False)
class Bound:
    """A session bound once to static arrays of one batch size. start: runs it."""

    inputs: Sequence[DeviceArray]
    outputs: Sequence[DeviceArray]
    start: Callable[[], Any]

    def __call__(self, inputs: Sequence[DeviceArray | NDArray[Any]]) -> Answers:
        """Copies, padded with the last image, and run -> rows of the static outputs, valid until the next call."""
        for static, values in zip(self.inputs, inputs, strict=True):
            static.write(values)
        self.start()
        return [static[: len(inputs[0])] for static in self.outputs]


class OnnxruntimeOnDevice(OnnxruntimeBackend):
    """As OnnxruntimeBackend, with arrays on the device. On the CPU it draws the same, which is how it is tested."""

    captures = True  # False: the oracle of the replay
    way_out = "take the device cpu, or export the student again"

    def __init__(self, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> None:
        super().__init__(folder, manifest, options)
        self.lacks = load_cuda(self._library, self._kind) if self._kind in NVIDIA else ""
        name = "cuda" if self._kind in NVIDIA else "cpu"
        self._on = Device(self._library, name, self._index, [(PROVIDERS[name], numbered(self._index))])
        self.batches = () if manifest.any_size else tuple(sorted({max(n, manifest.batch[0]) for n in options.batches}))
        self._uncaptured = set[str]()
        self._columns: LRUCache[bytes, DeviceArray] = LRUCache(MIXED)
        self._fed = dict[int, tuple[NDArray[Any], DeviceArray]]()  # by the host's array, its copy on the device

    def describe(self) -> str:
        missing = f"no CUDA graph of {', '.join(sorted(self._uncaptured))}" if self._uncaptured else "CUDA graphs"
        return f"{super().describe()}, {missing}"

    def open(self, graph: str, batch: int) -> Any:
        session, captured = self._load(graph, batch)
        free = self._free(graph, session)
        if not batch:
            return free
        spec, size = self.manifest.graphs[graph].inputs, self.manifest.sizes[0]
        inputs = [self._on.upload(np.zeros(value.at(batch, size), value.dtype)) for value in spec]
        outputs = free(inputs)  # convolutions are measured now, and these arrays are kept
        binding = session.io_binding()
        self._bind(binding, graph, inputs)
        for value, static in zip(self.manifest.graphs[graph].outputs, outputs, strict=True):
            self._on.bind_output(binding, value.name, static)
        told = self._told(CAPTURED if captured else UNCAPTURED)
        return Bound(inputs, outputs, lambda: session.run_with_iobinding(binding, told))

    def _load(self, graph: str, batch: int) -> tuple[Any, bool]:
        """A graph's session, and whether it is captured. Raises ArtifactError."""
        given = self._providers(graph, batch)
        if batch and self.captures:
            try:
                return self._session(graph, given, batch), True
            except ArtifactError:
                raise
            except Exception:  # onnxruntime's, for a graph of which part runs on the processor
                pass
        self._uncaptured.add(graph)
        return self._session(graph, uncaptured(given), batch), False

    def _free(self, graph: str, session: Any) -> Callable[[Sequence[Any]], Answers]:
        """Runs a session on arrays of any shape that it takes; what it gives is the caller's."""
        spec, told = self.manifest.graphs[graph], self._told(UNCAPTURED)

        def run(inputs: Sequence[Any]) -> Answers:
            binding = session.io_binding()
            self._bind(binding, graph, inputs)
            for value in spec.outputs:
                binding.bind_output(value.name, self._on.name, self._on.index)
            session.run_with_iobinding(binding, told)
            found = zip(spec.outputs, binding.get_outputs(), strict=True)
            return [
                DeviceArray(self._on, memory, tuple(memory.shape()), np.dtype(value.dtype)) for value, memory in found
            ]

        return run

    def _told(self, graph_id: str) -> Any:
        """Options of a run: which CUDA graph it captures or replays."""
        told = self._library.RunOptions()
        told.add_run_config_entry("gpu_graph_id", graph_id)
        return told

    def _bind(self, binding: Any, graph: str, inputs: Sequence[Any]) -> None:
        given = {value.name: values for value, values in zip(self.manifest.graphs[graph].inputs, inputs, strict=True)}
        for name, values in {**given, **self._fed_to(graph)}.items():
            self._on.bind_input(binding, name, values)

    def _fed_to(self, graph: str) -> dict[str, DeviceArray]:
        """The weights that a graph is fed, on the device; one that several graphs share is there once."""
        found = dict[str, DeviceArray]()
        for name, values in self.fed_to(graph).items():
            if id(values) not in self._fed:
                self._fed[id(values)] = values, self._on.upload(values)
            found[name] = self._fed[id(values)][1]
        return found

    def adapt(self, loras: LoraSet) -> None:
        super().adapt(loras)
        for values, static in self._fed.values():  # where they are, so that a captured graph reads them
            static.write(values)

    def upload(self, values: NDArray[Any]) -> Any:
        return self._on.upload(values)

    def join(self, arrays: Sequence[Any]) -> Any:
        if len(arrays) == 1 or isinstance(arrays[0], np.ndarray):
            return super().join(arrays)
        return self._on.join(arrays)

    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a graph, the caller's own. Raises ArtifactError with the library's reason."""
        run, answers = self._answers(graph, inputs)
        return [values.clone() for values in answers] if isinstance(run, Bound) else list(answers)

    def _answers(self, graph: str, inputs: Sequence[Any]) -> tuple[Any, Answers]:
        run: Any = self._graph(graph, self._bucket(len(inputs[0])))
        try:
            return run, run(inputs)
        except Exception as error:  # onnxruntime's share no base of their own
            raise self._broken(graph, error) from None

    def denoise(self, x: Any, timestep: NDArray[np.float32], conditions: Sequence[Any]) -> Any:
        """Of a bound graph valid until its next call."""
        return self._answers(self._at_size("denoiser", x), [x, timestep, *conditions])[1][0]

    def update(self, x: Any, m: Any, a: Column, b: Column, fresh: Fresh = None) -> Any:
        out = self._on.empty(x.shape, x.dtype)
        given = {"a": self._coefficients(a, x.ndim), "x": x, "b": self._coefficients(b, x.ndim), "m": m}
        if fresh is None:
            return self._on.compute(UPDATE, out, **given)
        return self._on.compute(RENOISED, out, **given, c=self._coefficients(fresh[0], x.ndim), z=fresh[1])

    def _coefficients(self, column: Column, ndim: int) -> DeviceArray:
        """One for each image (B, 1, ...); those of the plans' steps stay on the device."""
        key = column.tobytes()
        if key not in self._columns:
            self._columns[key] = self._on.upload(column)
        return self._columns[key].reshape(-1, *(1,) * (ndim - 1))

    def finite(self, x: Any) -> NDArray[np.bool_]:
        return super().finite(np.asarray(x))

    def decode(self, x: Any) -> Pictures:
        return self._drawn(self._at_size("decoder", x), [x], x)

    def sample(self, graph: str, inputs: Sequence[Any], *noises: Any) -> Pictures:
        return self._drawn(self._at_size(graph, noises[0]), [*inputs, *noises], noises[0])

    def _drawn(self, graph: str, inputs: Sequence[Any], x: Any) -> Pictures:
        """The only answers that leave the device."""
        return self.pictures([values.numpy() for values in self._answers(graph, inputs)[1]], x)

    def close(self) -> None:
        super().close()
        self._columns.clear()
        self._fed.clear()
