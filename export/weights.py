"""One file for the weights of all graphs: each tensor once, in half precision wherever that loses nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import missing_extra

try:
    import ml_dtypes
    import onnx
    from onnx import TensorProto, helper
except ImportError as error:
    raise missing_extra(error.name or "onnx", "export") from None

WEIGHTS_FILE = "weights.bin"
INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference and constant folding can see them
ALIGNMENT = 64
NUMPY: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class WeightRef:
    """Where a weight lies in the weights file, the type it is stored in, and the type that the graph's nodes see."""

    shape: tuple[int, ...]
    stored: int  # TensorProto.FLOAT, FLOAT16 or BFLOAT16
    seen: int
    offset: int
    length: int


class WeightStore:
    """Appends tensors to one file; equal bytes are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        path.touch()

    def add(self, values: NDArray[Any]) -> WeightRef:
        """Stores a tensor for nodes that see float32: of half precision as it is, of float32 as float16 if converting it and
        back changes no bit. Lossless either way."""
        if values.dtype != np.float32:
            return self._append(
                values, next(kind for kind, dtype in NUMPY.items() if dtype == values.dtype), TensorProto.FLOAT
            )
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        lossless = half.astype(np.float32).tobytes() == np.ascontiguousarray(values, dtype=np.float32).tobytes()
        stored = TensorProto.FLOAT16 if lossless else TensorProto.FLOAT
        return self._append(half if lossless else values, stored, TensorProto.FLOAT)

    def lower(self, ref: WeightRef, to: int) -> WeightRef:
        """The same weight for nodes of type `to` (FLOAT16, BFLOAT16): rounded to nearest, shared where it is stored so."""
        if ref.stored == to:
            return WeightRef(ref.shape, to, to, ref.offset, ref.length)
        with np.errstate(over="ignore"):
            return self._append(self.read(ref).astype(NUMPY[to]), to, to)

    def read(self, ref: WeightRef) -> NDArray[np.float32]:
        """The weight's values."""
        dtype = NUMPY[ref.stored]
        raw = np.fromfile(self.path, dtype=np.uint8, count=ref.length, offset=ref.offset)
        return raw.view(dtype).reshape(ref.shape).astype(np.float32)

    def keep(self, weights: Iterable[WeightRef]) -> dict[int, int]:
        """Rewrites the file with these weights alone, which half precision has left beside the float32 ones; where each of
        them lies now, by its old offset."""
        lengths = {ref.offset: ref.length for ref in weights}
        old, moved = self.path.with_name(f".old-{self.path.name}"), dict[int, int]()
        os.replace(self.path, old)
        try:
            with open(old, "rb") as source, open(self.path, "wb") as file:
                for offset, length in sorted(lengths.items()):
                    file.write(b"\0" * (-file.tell() % ALIGNMENT))
                    moved[offset] = file.tell()
                    source.seek(offset)
                    file.write(source.read(length))
        finally:
            old.unlink()
        self._offsets = {key: moved[offset] for key, offset in self._offsets.items() if offset in moved}
        return moved

    def _append(self, values: NDArray[Any], stored: int, seen: int) -> WeightRef:
        data = np.ascontiguousarray(values).tobytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._offsets:
            with open(self.path, "ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self._offsets[key] = file.tell()
                file.write(data)
        return WeightRef(tuple(values.shape), stored, seen, self._offsets[key], len(data))


def attach(graph: onnx.GraphProto, weights: dict[str, WeightRef], location: str = WEIGHTS_FILE) -> None:
    """Adds the weights to a graph as external tensors; those stored in another type behind a Cast of their name.

    onnxruntime folds the Casts when it loads the graph, so the arithmetic is in the seen type from the first run on.
    """
    casts: list[Any] = []
    for name, ref in weights.items():
        stored = name if ref.stored == ref.seen else f"{name}:stored"
        tensor = TensorProto(name=stored, data_type=ref.stored, dims=ref.shape, data_location=TensorProto.EXTERNAL)
        entries = {"location": location, "offset": str(ref.offset), "length": str(ref.length)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        graph.initializer.append(tensor)
        if ref.stored != ref.seen:
            casts.append(helper.make_node("Cast", [stored], [name], to=ref.seen))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
