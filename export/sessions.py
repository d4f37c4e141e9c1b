"""Graphs in onnxruntime on the CPU, as the gate runs them: one at a time, and with the memory that large models leave."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import ParityError, missing_extra
from .weights import WEIGHTS_FILE

LARGE = 200_000_000  # bytes of weights
WIDENING = ["ConstantFolding"]  # would make a second, float32 copy of every weight that is stored in half precision

Run = Callable[..., list[NDArray[Any]]]  # run(*tensors) -> outputs


def open_session(path: Path, *, half: bool = False) -> Any:
    """An onnxruntime session of a graph beside its weights file. half: its nodes are of half precision, before which onnxruntime
    puts Casts of its own, and its usual order computes all of them first. Raises ParityError, MissingExtraError."""
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "cpu") from None
    options, large = onnxruntime.SessionOptions(), is_large(path)
    options.log_severity_level = 3
    options.enable_mem_reuse = large  # planning it is slow; its memory matters when large
    options.add_session_config_entry("session.disable_prepacking", str(int(large)))  # a second copy of the weights
    if large:
        options.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        )  # beyond, weights are copied
        options.enable_mem_pattern = False  # the second run's plan would lie beside what the first left in the arena
        options.execution_order = getattr(onnxruntime.ExecutionOrder, "PRIORITY_BASED" if half else "DEFAULT")
    widening = WIDENING if large else []
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=widening
        )
    except Exception as error:  # the library's errors share no base of their own
        raise ParityError(f"onnxruntime does not load {path.name}: {' '.join(str(error).split())[:300]}") from None


def is_large(path: Path) -> bool:
    """Whether the weights beside a graph are so many that memory matters more than speed."""
    return (path.parent / WEIGHTS_FILE).stat().st_size > LARGE


class GraphSession:
    """A graph's session as run(*tensors) -> outputs, closed at the end: large graphs do not fit side by side."""

    def __init__(self, path: Path, *, half: bool = False) -> None:
        self.path, self.half = path, half

    def __enter__(self) -> Run:
        self._session = open_session(self.path, half=self.half)
        names = [value.name for value in self._session.get_inputs()]

        def run(*tensors: torch.Tensor) -> list[NDArray[Any]]:
            feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [np.asarray(value) for value in self._session.run(None, feed)]

        return run

    def __exit__(self, *_: object) -> None:
        del self._session
        if is_large(self.path):  # of a small model, looking for what is dead took a tenth of the export
            give_back_memory()


def give_back_memory() -> None:
    """Frees what is dead and hands it to the system: glibc would keep gigabytes of weights too small to be mapped singly."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none
    if trim is not None:
        trim(0)
