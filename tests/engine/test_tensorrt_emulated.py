"""The TensorRT backend above a TensorRT and a CUDA that are emulated: what it asks of them, in which order, and what it draws.

A plan's bytes name an ONNX graph, which onnxruntime runs on the memory that a context was given; whatever lies in the workspace
is gone afterwards. A captured graph runs what was enqueued again.
"""

import ctypes
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from imagine_flash.core.errors import ArtifactError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends import tensorrt as backend_module
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.choosing import load_backend
from imagine_flash.engine.backends.tensorrt import TensorrtBackend
from imagine_flash.engine.tokenizer import PromptTokenizer
from imagine_flash.export.tensorrt import write_plan, write_tensorrt
from imagine_flash.folders.manifests import ArtifactManifest
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.folders.tensorrt_plans import BuildRecipe, PlanKey, plan_key, read_json
from imagine_flash.tests.artifacts import with_format
from imagine_flash.tests.tensorrt_artifact import HERE

DataType = Enum("DataType", "FLOAT HALF BF16 INT32 INT64 UINT8 BOOL")
Strategy = Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
KINDS = {"float32": DataType.FLOAT, "int64": DataType.INT64, "uint8": DataType.UINT8, "bool": DataType.BOOL}


class Gpu:
    """What the emulated libraries share: the calls under way, and a capture."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_artifact_manifest(folder)
        self.recipe = read_json(folder / "tensorrt" / "build.json", BuildRecipe)
        self.capture = threading.local()  # of the thread that captures, as it was asked for
        self.running = threading.Lock()
        self.contexts: list[Context] = []

    def enqueue(self, call: Any) -> None:
        if getattr(self.capture, "calls", None) is not None:
            self.capture.calls.append(call)
            return
        assert self.running.acquire(blocking=False), "two contexts that share a workspace at the same time"
        try:
            call()
        finally:
            self.running.release()


class Context:
    """As strict as TensorRT: first the profile, then shapes within it, then the memory they need, then addresses."""

    def __init__(self, gpu: Gpu, graph: str, key: PlanKey, session: onnxruntime.InferenceSession) -> None:
        self.gpu, self.graph, self.key, self.session = gpu, graph, key, session
        self.spec = gpu.manifest.graphs[graph]
        self.profile: int | None = None
        self.shapes, self.addresses = dict[str, tuple[int, ...]](), dict[str, int]()
        self.memory, self.size = 0, 0
        gpu.contexts.append(self)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile, self.shapes = profile, {}
        return profile < len(self.key.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        low, _, high = self.key.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes.keys() == {value.name for value in self.spec.inputs}
        return 1000 * self.batch * (1 + len(self.spec.inputs))

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self.memory, self.size = memory, size

    @property
    def batch(self) -> int:
        return next(iter(self.shapes.values()))[0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        value = next(v for v in (*self.spec.inputs, *self.spec.outputs) if v.name == name)
        return tuple(self.batch if isinstance(size, str) else size for size in value.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory and len(self.addresses) == len(self.spec.inputs) + len(self.spec.outputs)
        self.gpu.enqueue(self.run)
        return True

    def array(self, value: Any) -> np.ndarray:
        shape, dtype = self.get_tensor_shape(value.name), np.dtype(value.dtype)
        held: Any = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[value.name])
        return np.frombuffer(held, dtype).reshape(shape)

    def run(self) -> None:
        ctypes.memset(self.memory, 0xFF, self.update_device_memory_size_for_shapes())
        outputs: Any = self.session.run(None, {value.name: self.array(value) for value in self.spec.inputs})
        for value, found in zip(self.spec.outputs, outputs, strict=True):
            self.array(value)[...] = found


class Plan:
    """An engine of TensorRT: what `deserialize_cuda_engine` gives."""

    def __init__(self, gpu: Gpu, plan: bytes) -> None:
        self.gpu, self.graph = gpu, plan.decode()
        self.spec = gpu.manifest.graphs[self.graph]
        self.key = plan_key(gpu.manifest, gpu.recipe, self.graph, HERE)
        self.session = onnxruntime.InferenceSession(gpu.folder / self.spec.file, providers=["CPUExecutionProvider"])

    def create_execution_context(self, strategy: Strategy) -> Context:
        assert strategy is Strategy.USER_MANAGED
        return Context(self.gpu, self.graph, self.key, self.session)

    def get_tensor_dtype(self, name: str) -> DataType:
        return KINDS[next(v for v in (*self.spec.inputs, *self.spec.outputs) if v.name == name).dtype]


def emulated_tensorrt(gpu: Gpu) -> ModuleType:
    module: Any = ModuleType("tensorrt")
    module.ILogger = type("ILogger", (), {"Severity": Enum("Severity", "INTERNAL_ERROR ERROR WARNING")})
    module.DataType, module.ExecutionContextAllocationStrategy = DataType, Strategy
    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: Plan(gpu, plan))
    return module


class Graph:
    calls: list[Any]

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def replay(self) -> None:
        for call in self.calls:
            self.gpu.enqueue(call)


def emulate_cuda(gpu: Gpu, patch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=1, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    cpu = torch.device("cpu")

    @contextmanager
    def capture(graph: Graph, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        gpu.capture.calls = graph.calls = []
        try:
            yield
        finally:
            gpu.capture.calls = None

    given: dict[str, Any] = {
        "is_available": lambda: True,
        "Stream": lambda device: stream,
        "Event": lambda enable_timing: event,
        "stream": lambda stream: nullcontext(),
        "set_stream": lambda stream: None,
        "current_stream": lambda device: stream,
        "synchronize": lambda device: None,
        "get_device_name": lambda device: "an emulated GPU",
        "CUDAGraph": lambda: Graph(gpu),
        "graph": capture,
    }
    for name, value in given.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.Tensor, "pin_memory", lambda values: values)
    patch.setattr(torch, "device", lambda *name: cpu)


@pytest.fixture(scope="module")
def planned(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact with what stands for a plan of each graph."""
    folder = shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("emulated") / "artifact")
    manifest = with_format(folder, "tensorrt", write_tensorrt)
    recipe = read_json(folder / "tensorrt" / "build.json", BuildRecipe)
    for graph in manifest.graphs:
        write_plan(folder, plan_key(manifest, recipe, graph, HERE), graph.encode())
    return folder


@pytest.fixture
def gpu(planned: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(planned)
    monkeypatch.setitem(sys.modules, "tensorrt", emulated_tensorrt(gpu))
    monkeypatch.setattr(backend_module, "this_machine", lambda folder: HERE)
    emulate_cuda(gpu, monkeypatch)
    return gpu


def load(gpu: Gpu, *batches: int) -> TensorrtBackend:
    backend = load_backend("tensorrt", gpu.folder, gpu.manifest, BackendOptions(batches=batches))
    assert isinstance(backend, TensorrtBackend)
    return backend


def engine_of(gpu: Gpu, manifest: ArtifactManifest, route: Any) -> Engine:
    tokenizer = PromptTokenizer.load(gpu.folder, manifest.tokenizers)
    return Engine(load(gpu, 1, 2, 3), tokenizer, manifest, route=route, max_batch=3)


@pytest.fixture(scope="module")
def expected(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend="onnxruntime", device="cpu") as engine:
        yield engine


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("route", ["stages", "sampler"])
def test_it_draws_what_onnxruntime_draws(
    gpu: Gpu, expected: Engine, route: str, captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorrtBackend, "captures", captures)
    with engine_of(gpu, gpu.manifest, route) as engine:
        for steps, count in ((1, 1), (2, 5), (3, 2)):
            request = GenerateRequest(prompt="a cat", seed=7, steps=steps, count=count)
            got = engine.generate(request)
            assert np.abs(got.images.astype(int) - expected.generate(request).images).max() <= 1
        assert engine.backend.describe() == f"tensorrt {HERE.tensorrt} on an emulated GPU, fp32, CUDA graphs"
        assert route == "sampler" or got.timings.denoise[0] == 0.001, "by the device's watch"


def test_requests_at_the_same_time_do_not_mix(gpu: Gpu, expected: Engine) -> None:
    """Graphs are opened while others run; nothing of one lies in the workspace when another starts."""
    requests = [GenerateRequest(prompt=f"a cat {i % 3}", seed=i, steps=1 + i % 3) for i in range(12)]
    with engine_of(gpu, gpu.manifest, "stages") as engine, ThreadPoolExecutor(12) as pool:
        for request, got in zip(requests, pool.map(engine.generate, requests), strict=True):
            assert np.abs(got.images.astype(int) - expected.generate(request).images).max() <= 1


def test_a_graph_may_be_opened_while_another_runs(gpu: Gpu) -> None:
    """Its first run would come between the kernels of the other and write into the same workspace."""
    backend, done = load(gpu, 1, 2, 3), threading.Event()
    backend.prepare(["text_encoder", "denoiser"], (1,))
    conditions = backend.encode({"input_ids": np.ones((1, 16), np.int64)})
    x = backend.upload(np.ones((1, *gpu.manifest.latent_shape), np.float32))
    first = backend.denoise(x, np.array([999], np.float32), conditions).clone()

    def draw() -> bool:
        same = True
        while not done.is_set():
            same &= torch.equal(backend.denoise(x, np.array([999], np.float32), conditions), first)
        return same

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        for graph in ("denoiser", "decoder", "sampler_1", "sampler_2", "sampler_3"):
            backend.prepare([graph], (2, 3))
        done.set()
        assert drawing.result(60)


def test_one_workspace_as_large_as_the_hungriest(gpu: Gpu) -> None:
    backend = load(gpu, 1, 3)
    backend.prepare(["text_encoder", "denoiser", "decoder"], (1, 3))
    assert len(gpu.contexts) == 6
    assert len({context.memory for context in gpu.contexts}) == 1
    assert {context.size for context in gpu.contexts} == {3 * 1000 * (1 + 3)}, "three pictures in the denoiser"
    backend.prepare(["sampler_3"], (3,))  # reads fewer inputs
    assert gpu.contexts[-1].memory == gpu.contexts[0].memory


def test_a_graph_opened_later_takes_a_larger_one_of_its_own(gpu: Gpu) -> None:
    backend = load(gpu, 1, 3)
    backend.prepare(["denoiser"], (1,))
    before = backend._workspace
    backend.prepare(["denoiser"], (3,))
    small, large = gpu.contexts
    assert (small.size, large.size) == (4000, 12000) and small.memory == before.data_ptr() != large.memory


def test_each_batch_has_the_profile_that_takes_it(gpu: Gpu) -> None:
    load(gpu, 1, 2, 3).prepare(["denoiser"], (1, 2, 3))
    assert {context.batch: context.profile for context in gpu.contexts} == {1: 0, 2: 1, 3: 1}


def test_a_step_uploads_its_times_only(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, uploads = load(gpu, 1), list[tuple[int, ...]]()
    pinned = torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda v: (uploads.append(tuple(v.shape)), pinned(v))[1])
    table = gpu.manifest.update_tables()[3]
    x = backend.upload(np.zeros((1, *gpu.manifest.latent_shape), np.float32))
    conditions = backend.encode({"input_ids": np.ones((1, 16), np.int64)})
    uploads.clear()
    for step in range(3):
        m = backend.denoise(x, np.array([999], np.float32), conditions)
        a, b = (values[step : step + 1].astype(np.float32) for values in (table.a, table.b))
        x = backend.update(x, m, a, b)
    assert uploads == [(1,)] * 3


def test_a_batch_that_no_profile_takes(gpu: Gpu) -> None:
    with pytest.raises(ArtifactError) as error:
        load(gpu, 1, 4).prepare(["denoiser"], (4,))
    assert str(error.value) == (
        f"no profile of the plan of 'denoiser' takes a batch of 4; run 'imagine-flash build-tensorrt {gpu.folder}'"
    )
