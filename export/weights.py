"""One file for the weights of all graphs: each tensor once, in half precision wherever that loses nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import missing_extra

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError:
    raise missing_extra("onnx", "export") from None

WEIGHTS_FILE = "weights.bin"
INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference and constant folding can see them
ALIGNMENT = 64


@dataclass(frozen=True)
class WeightRef:
    """Where a float32 weight lies in the weights file, and whether it is stored as float16."""

    shape: tuple[int, ...]
    half: bool
    offset: int
    length: int


class WeightStore:
    """Appends tensors to one file; equal bytes are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        path.touch()

    def add(self, values: np.ndarray) -> WeightRef:
        """Stores a float32 tensor, as float16 if converting it and back changes no bit. Lossless either way."""
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        lossless = half.astype(np.float32).tobytes() == np.ascontiguousarray(values, dtype=np.float32).tobytes()
        data = np.ascontiguousarray(half if lossless else values).tobytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._offsets:
            with open(self.path, "ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self._offsets[key] = file.tell()
                file.write(data)
        return WeightRef(tuple(values.shape), lossless, self._offsets[key], len(data))


def attach(graph: onnx.GraphProto, weights: dict[str, WeightRef]) -> None:
    """Adds the weights to a graph as external tensors; half precision ones behind a Cast to float32 of their name.

    onnxruntime folds the Casts when it loads the graph, so the arithmetic is float32 from the first run on.
    """
    casts: list[Any] = []
    for name, ref in weights.items():
        stored = f"{name}:half" if ref.half else name
        tensor = TensorProto(
            name=stored,
            data_type=TensorProto.FLOAT16 if ref.half else TensorProto.FLOAT,
            dims=ref.shape,
            data_location=TensorProto.EXTERNAL,
        )
        entries = {"location": WEIGHTS_FILE, "offset": str(ref.offset), "length": str(ref.length)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        graph.initializer.append(tensor)
        if ref.half:
            casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
