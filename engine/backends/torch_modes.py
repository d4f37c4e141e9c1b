"""How torch runs a network: as it is, compiled for one batch size, or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.errors import ArtifactError
from ..processors import processors
from .base import Stopped, check_device
from .graphs import Run

WARM_UP = 3  # calls before a capture, for what libraries allocate and choose at their first ones
Network = Callable[..., Any]  # tensors -> one, or a tuple


class InPrecision(torch.nn.Module):
    """A denoiser that takes latents in any precision and computes in `dtype`, that of the conditions."""

    def __init__(self, denoiser: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.dtype = denoiser, dtype

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x.to(self.dtype), timestep, *conditions)


class OnGpu(torch.nn.Module):
    """A decoder whose pixels are written by the kernel, from the vae's own dtype."""

    def __init__(self, decoder: Any) -> None:
        from ...kernels.to_image import to_image

        super().__init__()
        self.decoder, self.to_image = decoder, to_image

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = self.decoder.decode(latents)
        return self.to_image(decoded), self.decoder.all_finite(latents, decoded)


def keep_channels_last(network: torch.nn.Module) -> int:
    """Lets the transformers inside a UNet hand on a view where diffusers' copy it to the other layout, in which every norm and
    convolution after them copies again: about a quarter of what an H100 did for SD-Turbo. Returns how many there were."""
    parts: list[Any] = [part for part in network.modules() if hasattr(part, "_get_output_for_continuous_inputs")]
    for part in parts:
        part._get_output_for_continuous_inputs = MethodType(_output_as_view, part)
    return len(parts)


def _output_as_view(
    self: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    """Tokens (B, h w, C) and what they are added to (B, C, h, w) -> (B, C, h, w), channels_last."""
    shape = (batch_size, height, width, inner_dim)
    if self.use_linear_projection:
        return self.proj_out(hidden_states).view(shape).permute(0, 3, 1, 2) + residual
    return self.proj_out(hidden_states.view(shape).permute(0, 3, 1, 2)) + residual


Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # a call -> its replay, and its static outputs


def cuda_graphs(device: torch.device) -> Capture:
    """Captures calls as CUDA graphs of one memory pool, on a stream of this device: torch's own default stream belongs to the
    device that captured first, where another one's graph stays empty.

    cuBLAS gets its workspace anew from the pool, where it lives as long as the graphs: the one of the warm-up is freed by whoever
    clears all of them, as torch.compile's own graphs do, and a graph that was captured with it would write into freed memory.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        clear_workspaces()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = call()
        clear_workspaces()
        return graph.replay, outputs

    return capture


def clear_workspaces() -> None:
    """Frees what cuBLAS computes in; it takes new ones when it is called next. torch has no public name for it."""
    torch._C._cuda_clearCublasWorkspaces()


class Captured:
    """A network for one batch size, captured over static arrays; its outputs are valid until any graph of the pool runs, whose
    temporaries may lie in the same memory.

    inputs: the static arrays, in the dtype and layout that the network computes in. `ready` is the state whose values already
    lie in the first of them, since the update wrote them there: it is not copied again.
    """

    def __init__(self, network: Network, inputs: Sequence[torch.Tensor], capture: Capture) -> None:
        self.inputs = inputs
        self.network = network  # the graph reads its tensors at their addresses, and keeps none of them alive
        self.ready: torch.Tensor | None = None
        self._replay, self._outputs = capture(lambda: network(*inputs))

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Copies and run, padded with the last image -> rows of the static outputs."""
        rows = len(inputs[0])
        for i, (static, values) in enumerate(zip(self.inputs, inputs, strict=True)):
            if i or values is not self.ready:
                static[:rows].copy_(values, non_blocking=True)
            if rows < len(static):
                static[rows:] = static[rows - 1]
        if inputs[0] is not self.ready:
            self.ready = None
        self._replay()
        return [values[:rows] for values in _as_list(self._outputs)]

    def next_input(self, rows: int) -> torch.Tensor:
        """Where the update writes what the network reads next; whoever does so sets `ready` afterwards."""
        self.ready = None
        return self.inputs[0][:rows]


def as_run(network: Network) -> Run:
    """The network as a graph: a list in, a list out."""

    def run(inputs: Sequence[Any]) -> list[Any]:
        return _as_list(network(*inputs))

    return run


def _as_list(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def device_of(name: str) -> torch.device:
    """The device meant by auto, cpu, cuda or cuda:N. Raises ArtifactError for one that is not there."""
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    check_device("torch", name)
    device = torch.device(name)
    if device.type == "cuda" and not there:
        raise ArtifactError(f"torch {torch.__version__} finds no CUDA; install the build of torch for this GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArtifactError(f"there is no {name}: torch finds {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def use_threads(threads: int | None) -> None:
    """So many, by default as many as this process may use; for the whole process, as torch knows no other way."""
    if threads is not None or processors() < torch.get_num_threads():
        torch.set_num_threads(threads or processors())


def check_mode(backend: str, device: torch.device) -> None:
    """Raises ArtifactError where a backend's name and its device do not go together."""
    if backend == "torch-graph" and device.type != "cuda":
        raise ArtifactError("torch-graph captures CUDA graphs, and the device is cpu; take torch or torch-compile")


class _Float32:
    """While anybody computes in it, convolutions are not rounded to TF32, which torch does unless it is told not to, for the whole
    process: of several engines that compute at once, the first tells it and the last takes it back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cudnn.allow_tf32 = self._before


_FLOAT32 = _Float32()  # one, as the setting is


@contextmanager
def current(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Makes a GPU the current one, since Triton and captures start there; float32 is computed in float32."""
    with ExitStack() as entered:
        if device.type == "cuda":
            entered.enter_context(torch.cuda.device(device))
            if dtype is torch.float32:
                entered.enter_context(_FLOAT32)
        yield


def device_stopwatch(device: torch.device) -> Callable[[], Stopped]:
    """Starts a watch of a GPU's time: of what was queued, not of the queueing."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    start.record(stream)

    def stop() -> Stopped:
        end.record(stream)
        return seconds

    def seconds() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return stop


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy, pictures and latents in channels_last; to a GPU queued, from memory that it reads by itself."""
    layout = torch.channels_last if values.ndim == 4 else torch.contiguous_format
    given = torch.from_numpy(np.require(values, requirements="W"))  # a request's pictures cannot be written
    if device.type != "cuda":
        return given.clone(memory_format=layout)
    pinned = torch.empty(values.shape, dtype=given.dtype, pin_memory=True, memory_format=layout)
    return pinned.copy_(given).to(device, non_blocking=True)


def to_host(tensors: Sequence[torch.Tensor], device: torch.device) -> list[NDArray[Any]]:
    """Their values, once the device has them."""
    if device.type != "cuda":
        return [each.numpy() for each in tensors]
    hosts = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
    for host, each in zip(hosts, tensors, strict=True):
        host.copy_(each, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return [host.numpy() for host in hosts]
