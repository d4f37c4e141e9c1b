"""TensorRT plans on the first NVIDIA GPU; arrays are torch's, on the device.

`imagine-flash build-tensorrt` builds the plans; folders/tensorrt_plans.py finds those that fit this machine. Each graph and
batch size has one context, bound once to static arrays; its enqueue is captured once as a CUDA graph, then replayed. The
loop over the steps cannot be one CUDA graph: requests join and leave between steps, so the rows of its calls differ. A
whole-sampler plan (route "sampler") is that graph, where all its rows start and end together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ArtifactError, missing_extra
from ...folders.manifests import ArtifactManifest
from ...folders.tensorrt_plans import COMMAND, Machine, PlanRecord, find_plan, read_json, this_machine
from .base import BackendOptions, Column, Fresh, Pictures
from .graphs import GraphBackend


@dataclass(frozen=True, eq=False)
class Bound:
    """A context for one batch size, bound to static arrays on the device. start: puts it on the current stream."""

    context: Any  # kept, since a captured graph points into its memory
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    start: Callable[[], Any]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Queues copies and run, padded with the last image -> rows of the static outputs, valid until the next call."""
        rows = len(inputs[0])
        for array, values in zip(self.inputs, inputs, strict=True):
            array[:rows].copy_(values, non_blocking=True)
            if rows < len(array):
                array[rows:] = array[rows - 1]
        self.start()
        return [array[:rows] for array in self.outputs]


class TensorrtBackend(GraphBackend[ArtifactManifest]):
    """device: auto, cuda or cuda:0; CUDA_VISIBLE_DEVICES says which GPU that is. The precision is the plans' own.

    All work goes on one stream, which becomes the calling thread's current one, so that what it computes with our arrays
    between calls stays in order. Only `finite`, `decode` and `sample` wait for the device, and what opens a graph.
    """

    name = "tensorrt"
    captures = True  # False: every call enqueues anew, the oracle of the replay

    def __init__(self, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> None:
        super().__init__(folder, manifest)
        self._machine = self.check(folder, manifest, options)
        self.batches = tuple(sorted({max(batch, manifest.batch[0]) for batch in options.batches}))
        self._engines, self._uncaptured = dict[str, Any](), set[str]()
        self._errors = deque[str](maxlen=1)  # TensorRT's last one
        self._start_tensorrt()
        self._start_torch()

    @staticmethod
    def check(folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> Machine:
        """The machine whose plans are wanted. Raises ArtifactError, MissingExtraError."""
        if options.device not in ("auto", "cuda", "cuda:0"):
            raise ArtifactError(
                f"TensorRT plans run on the first GPU: device must be auto, cuda or cuda:0, got {options.device!r}; "
                "CUDA_VISIBLE_DEVICES=N makes another one the first"
            )
        if options.precision not in ("auto", manifest.precision):
            raise ArtifactError(
                f"TensorRT plans compute in their graphs' precision, {manifest.precision}; for {options.precision} run "
                f"'imagine-flash export STUDENT OUT --precision {options.precision}'"
            )
        if options.loras:
            raise ArtifactError(
                "LoRAs are not swapped in TensorRT plans; take the student with --backend torch, or fuse them: "
                "imagine-flash export --lora"
            )
        machine = this_machine(folder)
        if find_spec("torch") is None:
            raise missing_extra("torch", "tensorrt")
        return machine

    def _start_tensorrt(self) -> None:
        trt: Any = import_module("tensorrt")
        errors = self._errors

        class Log(trt.ILogger):
            def log(self, severity: Any, msg: str) -> None:
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    errors.append(msg)

        self._logger = Log()
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError:  # pybind11's word for a null pointer
            raise self._failed("cannot start on this machine", "see what nvidia-smi says") from None

    def _start_torch(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ArtifactError(f"torch {torch.__version__} finds no CUDA; install the build of torch for this GPU")
        self._torch: Any = torch
        trt: Any = import_module("tensorrt")
        self._types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
            trt.DataType.UINT8: torch.uint8,
            trt.DataType.BOOL: torch.bool,
        }
        self._device = torch.device("cuda", 0)
        self._stream, self._side = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            self._steps = torch.arange(self.batches[-1], dtype=torch.int32, device=self._device)
            x = torch.zeros(1, *self.manifest.latent_shape, device=self._device)
            try:  # compiled now, not in the first request
                fused_update(x, x, x.new_zeros(1, 3), self._steps[:1])
            except Exception as error:
                raise ArtifactError(f"Triton, which needs a C compiler, cannot start: {str(error)[:300]}") from None

    def describe(self) -> str:
        device = self._torch.cuda.get_device_name(self._device)
        graphs = f"no CUDA graph of {', '.join(sorted(self._uncaptured))}" if self._uncaptured else "CUDA graphs"
        return f"tensorrt {self._machine.tensorrt} on {device}, {self.manifest.precision}, {graphs}"

    def open(self, graph: str, batch: int) -> Bound:
        torch, spec, rebuild = self._torch, self.manifest.graphs[graph], f"run '{COMMAND} {self.folder}'"
        with torch.cuda.stream(self._side):  # another thread may be drawing on the other one
            engine = self._engine(graph)
            self._errors.clear()
            context = engine.create_execution_context()
            if context is None:
                raise self._failed(f"cannot run the plan of {graph!r}", "free memory of the GPU")
            for value in spec.inputs:
                shape = tuple(batch if isinstance(size, str) else size for size in value.shape)
                if not context.set_input_shape(value.name, shape):
                    raise self._failed(f"takes no {value.name} of the shape {shape} in {graph!r}", rebuild)
            arrays: dict[str, Any] = {}
            for value in (*spec.inputs, *spec.outputs):
                shape, kind = tuple(context.get_tensor_shape(value.name)), engine.get_tensor_dtype(value.name)
                arrays[value.name] = torch.zeros(shape, dtype=self._types[kind], device=self._device)
                if not context.set_tensor_address(value.name, arrays[value.name].data_ptr()):
                    raise self._failed(f"has no {value.name} in the plan of {graph!r}", rebuild)
            start = self._starter(graph, context)
        inputs, outputs = ([arrays[value.name] for value in values] for values in (spec.inputs, spec.outputs))
        return Bound(context, inputs, outputs, start)

    def _engine(self, graph: str) -> Any:
        """A graph's plan, loaded once for all batch sizes."""
        if graph not in self._engines:
            plan = plan_of(self.folder, graph, self._machine)
            flags = read_json(plan.with_suffix(".json"), PlanRecord).key.flags
            runtime = self._runtime
            runtime.engine_host_code_allowed = "VERSION_COMPATIBLE" in flags  # such a plan brings its own runtime along
            self._errors.clear()
            engine = runtime.deserialize_cuda_engine(plan.read_bytes())
            if engine is None:
                raise self._failed(f"cannot load {plan}", f"delete it and run '{COMMAND} {self.folder}'")
            self._engines[graph] = engine
        return self._engines[graph]

    def _starter(self, graph: str, context: Any) -> Callable[[], None]:
        """What runs a bound context: its captured graph, or an enqueue where it cannot be captured. Waits."""
        torch = self._torch

        def enqueue() -> None:
            if not context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
                raise self._failed(f"cannot run {graph!r}", "load the engine again")

        enqueue()  # TensorRT allocates at its first enqueue, which a capture would refuse
        self._side.synchronize()
        if self.captures:
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(captured, stream=self._side, capture_error_mode="thread_local"):
                    enqueue()
                return captured.replay
            except (RuntimeError, ArtifactError):  # TensorRT's answer to loops and to shapes that follow from data
                self._uncaptured.add(graph)
        return enqueue

    def _failed(self, what: str, way_out: str) -> ArtifactError:
        why = " ".join(self._errors[0].split())[:300] if self._errors else "it does not say why"
        return ArtifactError(f"TensorRT {self._machine.tensorrt} {what} ({why}); {way_out}")

    def upload(self, values: NDArray[Any]) -> Any:
        self._torch.cuda.set_stream(self._stream)
        return self._pinned(values).to(self._device, non_blocking=True)

    def _pinned(self, values: NDArray[Any]) -> Any:
        """In memory that the device copies from by itself; torch reuses it only when that is done."""
        return self._torch.from_numpy(np.require(values, None, ["C", "W"])).pin_memory()

    def join(self, arrays: Sequence[Any]) -> Any:
        if len(arrays) == 1 or isinstance(arrays[0], np.ndarray):
            return super().join(arrays)
        self._torch.cuda.set_stream(self._stream)
        return self._torch.cat(list(arrays))

    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        return [values.clone() for values in self._queue(graph, inputs)]

    def _queue(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Runs a graph on arrays of either kind -> what it gives, valid until its next call. Raises ArtifactError."""
        self._torch.cuda.set_stream(self._stream)
        run = self._graph(graph, self._bucket(len(inputs[0])))
        try:
            return run([self._pinned(values) if isinstance(values, np.ndarray) else values for values in inputs])
        except Exception as error:
            raise self._broken(graph, error) from None

    def denoise(self, x: Any, timestep: NDArray[np.float32], conditions: Sequence[Any]) -> Any:
        return self._queue(self._at_size("denoiser", x), [x, timestep, *conditions])[0]

    def update(self, x: Any, m: Any, a: Column, b: Column, fresh: Fresh = None) -> Any:
        c, z = (np.zeros_like(a), None) if fresh is None else fresh
        return fused_update(x, m, self.upload(np.stack([a, b, c], axis=1)), self._steps[: len(a)], z)

    def finite(self, x: Any) -> NDArray[np.bool_]:
        self._torch.cuda.set_stream(self._stream)
        return self._torch.isfinite(x).flatten(1).all(1).cpu().numpy()

    def decode(self, x: Any) -> Pictures:
        outputs = self._queue(self._at_size("decoder", x), [x])
        return self.pictures([values.cpu().numpy() for values in outputs], x)

    def sample(self, graph: str, inputs: Sequence[Any], *noises: Any) -> Pictures:
        outputs = self._queue(self._at_size(graph, noises[0]), [*inputs, *noises])
        return self.pictures([values.cpu().numpy() for values in outputs], noises[0])

    def close(self) -> None:
        self._torch.cuda.synchronize(self._device)
        super().close()
        self._engines.clear()


def plan_of(folder: Path, graph: str, machine: Machine) -> Path:
    """The graph's plan for this machine. Raises ArtifactError that says what differs, or what to run."""
    plan = find_plan(folder, graph, machine=machine)
    if plan is None:
        raise ArtifactError(f"{folder} has no TensorRT plan of {graph!r}; run '{COMMAND} {folder}'")
    return plan


def fused_update(x: Any, m: Any, rows: Any, steps: Any, z: Any = None) -> Any:
    """a x + b m + c z. rows: float32 (B, 3) of a, b, c for each image; steps: int32 0..B-1, on x's device."""
    from ...kernels.update import Coefficients, noise_corrected_update

    table = Coefficients(rows=rows, positions=steps, renoises=(False,) * len(rows), starts=(0,))
    return noise_corrected_update(x, m, table, steps, noise=z)
