"""TensorRT plans on the first NVIDIA GPU; arrays are torch's, on the device.

`imagine-flash build-tensorrt` builds the plans; folders/tensorrt_plans.py finds those that fit this machine. Each graph and
batch size has one context, with the profile that takes this batch, bound once to static arrays; its enqueue is captured once
as a CUDA graph, then replayed. What a context needs beside its arrays is one workspace for all, since one runs at a time. The
loop over the steps cannot be one CUDA graph: requests join and leave between steps, so the rows of its calls differ. A
whole-sampler plan (route "sampler") is that graph, where all its rows start and end together.
"""

from __future__ import annotations

import threading
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
from ...folders.tensorrt_plans import Machine, PlanKey, PlanRecord, command, find_plan, read_json, this_machine
from .base import BackendOptions, Column, Fresh, Pictures, Stopped
from .graphs import GraphBackend


@dataclass(frozen=True, eq=False)
class Bound:
    """A context for one batch size, bound to static arrays on the device. start: puts it on the current stream."""

    context: Any  # it and the workspace are kept, since a captured graph points into their memory
    workspace: Any
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
    between calls stays in order. Only `finite`, `decode` and `sample` wait for the device, and what opens a graph. _launching:
    held while work is enqueued, so that a graph opened meanwhile cannot come between the kernels of one that shares its
    workspace.
    """

    name = "tensorrt"
    captures = True  # False: every call enqueues anew, the oracle of the replay

    def __init__(self, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> None:
        super().__init__(folder, manifest)
        self._machine = self.check(folder, manifest, options)
        self.batches = tuple(sorted({max(batch, manifest.batch[0]) for batch in options.batches}))
        self._engines, self._uncaptured = dict[str, tuple[Any, PlanKey]](), set[str]()
        self._contexts = dict[tuple[str, int], tuple[Any, int]]()
        self._workspace: Any = None
        self._launching = threading.Lock()
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

        from .fused_update import FusedUpdate
        from .torch_modes import device_stopwatch, to_host

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
        table, *others = self.manifest.update_tables().values()
        self._to_host, self._stopwatch = to_host, device_stopwatch
        self._update = FusedUpdate([table, *others], self._device)
        a, b = (values[-1:].astype(np.float32) for values in (table.a, table.b))  # the last step re-noises nothing
        with torch.cuda.stream(self._stream):
            x = torch.zeros(1, *self.manifest.latent_shape, device=self._device)
            try:  # compiled now, not in the first request
                self._update(x, x, a, b)
            except Exception as error:
                raise ArtifactError(f"Triton, which needs a C compiler, cannot start: {str(error)[:300]}") from None

    def describe(self) -> str:
        device = self._torch.cuda.get_device_name(self._device)
        graphs = f"no CUDA graph of {', '.join(sorted(self._uncaptured))}" if self._uncaptured else "CUDA graphs"
        return f"tensorrt {self._machine.tensorrt} on {device}, {self.manifest.precision}, {graphs}"

    def stopwatch(self) -> Callable[[], Stopped]:
        self._torch.cuda.set_stream(self._stream)
        return self._stopwatch(self._device)

    def prepare(self, graphs: Sequence[str], batches: Sequence[int] = (1,)) -> None:
        buckets = {self._bucket(batch) for batch in batches}
        with self._lock:  # one workspace, as large as the hungriest needs it, before anything is bound to a smaller one
            self._reserve(max((self._context(graph, bucket)[1] for graph in graphs for bucket in buckets), default=0))
        super().prepare(graphs, batches)

    def open(self, graph: str, batch: int) -> Bound:
        torch, spec, rebuild = self._torch, self.manifest.graphs[graph], f"run '{command(self.folder, graph)}'"
        context, size = self._context(graph, batch)
        engine, _ = self._engine(graph)
        with torch.cuda.stream(self._stream):
            workspace = self._reserve(size)
            context.set_device_memory(workspace.data_ptr(), workspace.numel())
            arrays: dict[str, Any] = {}
            for value in (*spec.inputs, *spec.outputs):
                shape, kind = tuple(context.get_tensor_shape(value.name)), engine.get_tensor_dtype(value.name)
                arrays[value.name] = torch.zeros(shape, dtype=self._types[kind], device=self._device)
                if not context.set_tensor_address(value.name, arrays[value.name].data_ptr()):
                    raise self._failed(f"has no {value.name} in the plan of {graph!r}", rebuild)
            start = self._starter(graph, context)
        inputs, outputs = ([arrays[value.name] for value in values] for values in (spec.inputs, spec.outputs))
        return Bound(context, workspace, inputs, outputs, start)

    def _context(self, graph: str, batch: int) -> tuple[Any, int]:
        """A context for one batch size, told its profile and shapes but given no memory yet; and the bytes that it needs."""
        if (graph, batch) in self._contexts:
            return self._contexts[graph, batch]
        trt: Any = import_module("tensorrt")
        rebuild = f"run '{command(self.folder, graph)}'"
        engine, key = self._engine(graph)
        sizes = {value.name: value.shape for value in self.manifest.graphs[graph].inputs}
        shapes = {name: [batch if isinstance(size, str) else size for size in shape] for name, shape in sizes.items()}
        profile = key.profile_for(shapes)
        if profile is None:
            raise ArtifactError(f"no profile of the plan of {graph!r} takes a batch of {batch}; {rebuild}")
        self._errors.clear()
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._failed(f"cannot run the plan of {graph!r}", "free memory of the GPU")
        if not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise self._failed(f"has no profile {profile} in the plan of {graph!r}", rebuild)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise self._failed(f"takes no {name} of the shape {tuple(shape)} in {graph!r}", rebuild)
        self._contexts[graph, batch] = context, context.update_device_memory_size_for_shapes()
        return self._contexts[graph, batch]

    def _reserve(self, size: int) -> Any:
        """The workspace, of at least so many bytes; what is bound to a smaller one keeps that."""
        if self._workspace is None or self._workspace.numel() < size:
            self._workspace = self._torch.empty(size, dtype=self._torch.uint8, device=self._device)
        return self._workspace

    def _engine(self, graph: str) -> tuple[Any, PlanKey]:
        """A graph's plan, loaded once for all batch sizes, and what it was made from."""
        if graph not in self._engines:
            plan = plan_of(self.folder, graph, self._machine)
            key = read_json(plan.with_suffix(".json"), PlanRecord).key
            runtime = self._runtime
            # a version-compatible plan brings its own runtime along
            runtime.engine_host_code_allowed = "VERSION_COMPATIBLE" in key.flags
            self._errors.clear()
            engine = runtime.deserialize_cuda_engine(plan.read_bytes())
            if engine is None:
                raise self._failed(f"cannot load {plan}", f"delete it and run '{command(self.folder, graph)}'")
            self._engines[graph] = engine, key
        return self._engines[graph]

    def _starter(self, graph: str, context: Any) -> Callable[[], None]:
        """What runs a bound context: its captured graph, or an enqueue where it cannot be captured. Waits."""
        torch = self._torch

        def enqueue() -> None:
            if not context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
                raise self._failed(f"cannot run {graph!r}", "load the engine again")

        def locked(launch: Callable[[], Any]) -> Callable[[], None]:
            def start() -> None:
                with self._launching:
                    launch()

            return start

        locked(enqueue)()  # TensorRT allocates at its first enqueue, which a capture would refuse
        self._stream.synchronize()
        if self.captures:
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(captured, stream=self._side, capture_error_mode="thread_local"):
                    enqueue()
                return locked(captured.replay)
            except (RuntimeError, ArtifactError):  # TensorRT's answer to loops and to shapes that follow from data
                self._uncaptured.add(graph)
        return locked(enqueue)

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
        c, z = (None, None) if fresh is None else fresh
        self._torch.cuda.set_stream(self._stream)
        return self._update(x, m, a, b, c, noise=z)

    def finite(self, x: Any) -> NDArray[np.bool_]:
        self._torch.cuda.set_stream(self._stream)
        return self._torch.isfinite(x).flatten(1).all(1).cpu().numpy()

    def decode(self, x: Any) -> Pictures:
        return self.pictures(self._to_host(self._queue(self._at_size("decoder", x), [x]), self._device), x)

    def sample(self, graph: str, inputs: Sequence[Any], *noises: Any) -> Pictures:
        outputs = self._queue(self._at_size(graph, noises[0]), [*inputs, *noises])
        return self.pictures(self._to_host(outputs, self._device), noises[0])

    def close(self) -> None:
        self._torch.cuda.synchronize(self._device)
        super().close()
        self._contexts.clear()
        self._engines.clear()
        self._workspace = None


def plan_of(folder: Path, graph: str, machine: Machine) -> Path:
    """The graph's plan for this machine. Raises ArtifactError that says what differs, or what to run."""
    plan = find_plan(folder, graph, machine=machine)
    if plan is None:
        raise ArtifactError(f"{folder} has no TensorRT plan of {graph!r}; run '{command(folder, graph)}'")
    return plan
