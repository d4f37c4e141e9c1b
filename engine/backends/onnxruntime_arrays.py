"""Arrays that stay on onnxruntime's device, and the little that requests compute with them between network calls.

onnxruntime has no arithmetic of its own for its arrays, so each operator is a graph of one line that its provider runs. The slices
that the batcher takes, along the first axis, are addresses in the same memory: nothing runs for them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import missing_extra

OPSET, IR = 17, 8  # what every onnxruntime since 1.12 reads


class Device:
    """Where arrays lie, by onnxruntime's name (cuda, cpu), and the operators that run there. Whatever is asked for is done when
    the call returns: onnxruntime waits for the device at the end of each run.

    Thread-safe. Raises MissingExtraError without the package onnx, which writes the operators.
    """

    def __init__(self, library: Any, name: str, index: int, providers: Sequence[Any]) -> None:
        try:
            import onnx.parser
        except ImportError:
            raise missing_extra("onnx", "cuda") from None
        self._library, self._onnx, self._providers = library, onnx, providers
        self.name, self.index = name, index
        self._sessions: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Room for an array, whose values are not set."""
        memory = self._library.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self.name, self.index)
        return DeviceArray(self, memory, tuple(shape), np.dtype(dtype))

    def upload(self, values: NDArray[Any]) -> DeviceArray:
        """A copy of the values."""
        array = self.empty(values.shape, values.dtype)
        array.memory.update_inplace(np.ascontiguousarray(values))
        return array

    def join(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        """One batch out of several, in memory of its own."""
        out = self.empty((sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
        end = 0
        for array in arrays:
            begin, end = end, end + len(array)
            out[begin:end].copy_(array)
        return out

    def compute(self, body: str, out: DeviceArray, **inputs: DeviceArray | NDArray[Any]) -> DeviceArray:
        """Runs operators, in ONNX's text form, that read the inputs by name and give `out`, whose memory is written."""
        session = self._session(body, inputs, out.dtype)
        binding = session.io_binding()
        for name, values in inputs.items():
            self.bind_input(binding, name, values)
        self.bind_output(binding, "out", out)
        session.run_with_iobinding(binding)
        return out

    def bind_input(self, binding: Any, name: str, values: DeviceArray | NDArray[Any]) -> None:
        """Has a call read these; NumPy's are copied when it runs."""
        if isinstance(values, np.ndarray):
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        else:
            binding.bind_input(name, self.name, self.index, values.dtype, values.shape, values.address)

    def bind_output(self, binding: Any, name: str, array: DeviceArray) -> None:
        """Has a call write into this array."""
        binding.bind_output(name, self.name, self.index, array.dtype, array.shape, array.address)

    def _session(self, body: str, inputs: dict[str, Any], dtype: np.dtype[Any]) -> Any:
        kinds = [f"{self._kind(values.dtype)}[] {name}" for name, values in inputs.items()]
        key = (body, *kinds)
        with self._lock:
            if key not in self._sessions:
                head = f'<ir_version: {IR}, opset_import: ["" : {OPSET}]>'
                text = f"{head} operators ({', '.join(kinds)}) => ({self._kind(dtype)}[] out) {{ {body} }}"
                options = self._library.SessionOptions()
                options.log_severity_level, options.intra_op_num_threads = 3, 1
                self._sessions[key] = self._library.InferenceSession(
                    self._onnx.parser.parse_model(text).SerializeToString(), options, providers=self._providers
                )
            return self._sessions[key]

    def _kind(self, dtype: np.dtype[Any]) -> str:
        """ONNX's word for a type of NumPy."""
        helper, types = self._onnx.helper, self._onnx.TensorProto.DataType
        return types.Name(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))).lower()


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array (B, ...) in a device's memory, its values one after another from `offset` bytes on.

    Arithmetic with another one, an array of NumPy or a number gives a new array of this one's type, on the device; NumPy's
    functions get a copy on the host.
    """

    device: Device
    memory: Any = field(repr=False)  # an OrtValue, of which this may be a part
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0

    __array_ufunc__ = None  # so that NumPy's arrays and numbers leave their operators to this class

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        return int(self.memory.data_ptr()) + self.offset

    def __getitem__(self, rows: slice) -> DeviceArray:
        """These images, in the same memory."""
        begin, end, _ = rows.indices(len(self))
        offset = self.offset + begin * (self.nbytes // max(1, len(self)))
        return DeviceArray(self.device, self.memory, (max(0, end - begin), *self.shape[1:]), self.dtype, offset)

    def reshape(self, *shape: int) -> DeviceArray:
        """In the same memory; one side may be -1."""
        known = -prod(shape) if -1 in shape else prod(shape)
        sides = tuple(prod(self.shape) // known if side == -1 else side for side in shape)
        assert prod(sides) == prod(self.shape), (self.shape, shape)
        return DeviceArray(self.device, self.memory, sides, self.dtype, self.offset)

    def clone(self) -> DeviceArray:
        """In memory of its own."""
        return self.device.empty(self.shape, self.dtype).copy_(self)

    def copy_(self, values: DeviceArray) -> DeviceArray:
        """Writes these values, of the same size, into this array's memory."""
        assert values.nbytes == self.nbytes and values.dtype == self.dtype
        self.device.compute("out = Identity(x)", self._as_bytes(), x=values._as_bytes())
        return self

    def write(self, values: DeviceArray | NDArray[Any]) -> None:
        """Writes a batch of at most as many images into this array's memory; the last of them fills what is left."""
        rows = len(values)
        if isinstance(values, np.ndarray):
            assert self.nbytes == self.memory.tensor_size_in_bytes(), (
                "a part of an array is written on the device alone"
            )
            if rows < len(self):
                values = np.concatenate([values, np.repeat(values[-1:], len(self) - rows, axis=0)])
            self.memory.update_inplace(np.ascontiguousarray(values, self.dtype))
            return
        self[:rows].copy_(values)
        for row in range(rows, len(self)):
            self[row : row + 1].copy_(values[rows - 1 : rows])

    def numpy(self) -> NDArray[Any]:
        """A copy on the host."""
        values: NDArray[Any] = self.memory.numpy().reshape(-1)
        first = self.offset // self.dtype.itemsize
        return values[first : first + prod(self.shape)].reshape(self.shape).copy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __add__(self, other: Any) -> DeviceArray:
        return self._combined("Add", self, other)

    def __sub__(self, other: Any) -> DeviceArray:
        return self._combined("Sub", self, other)

    def __mul__(self, other: Any) -> DeviceArray:
        return self._combined("Mul", self, other)

    __radd__, __rmul__ = __add__, __mul__

    def _combined(self, operator: str, a: Any, b: Any) -> DeviceArray:
        other = b if isinstance(b, DeviceArray) else np.asarray(b, self.dtype)
        out = self.device.empty(np.broadcast_shapes(self.shape, other.shape), self.dtype)
        return self.device.compute(f"out = {operator}(a, b)", out, a=a, b=other)

    def _as_bytes(self) -> DeviceArray:
        return DeviceArray(self.device, self.memory, (self.nbytes,), np.dtype(np.uint8), self.offset)
