"""What an engine needs of a backend, and what a backend may be asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ArtifactError, nearest

BACKENDS = ("tensorrt", "openvino", "onnxruntime")  # run artifacts
STUDENT_BACKENDS = ("torch", "torch-compile", "torch-graph")  # run student folders
TUNED_BACKENDS = STUDENT_BACKENDS[1:]  # take `autotune`
DEVICES = {
    "tensorrt": "auto, cuda or cuda:0",
    "openvino": "auto, cpu, gpu, gpu:N or npu",
    "torch": "auto, cpu, cuda or cuda:N",
    "onnxruntime": "auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N, directml, directml:N or coreml",
}
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "fp8")
Array = Any  # the backend's own kind, batch first: of NumPy, or of torch on a device
Conditions = tuple[Array, ...]  # what the text encoder gives the denoiser, each (B, ...)
Column = NDArray[np.float32]  # one coefficient for each image (B,)
Fresh = tuple[Column, Array] | None  # the coefficients of fresh noise, and it, as x
LoraSet = tuple[tuple[str, float], ...]  # names and weights, in the order of names; () draws without
Pictures = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # images (B, H, W, 3); finite (B,)


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What a backend is asked for. batches: the batch sizes it will see most, increasing; the last is the largest.
    threads: processor threads of a network call; None leaves it to the backend, which takes all it may use. loras: the files,
    folders or hub ids of LoRAs that `adapt` is to know, by name. autotune: kernels are tried out when a network is loaded.

    Raises ArtifactError for an unknown precision.
    """

    device: str = "auto"
    precision: str = "auto"
    batches: tuple[int, ...] = (1,)
    threads: int | None = None
    loras: Mapping[str, str] = field(default_factory=dict)
    autotune: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ArtifactError(f"no precision {self.precision!r}{nearest(self.precision, PRECISIONS)}; known: {known}")


Stopped = Callable[[], float]  # the seconds, once the device has done the work


def stopwatch() -> Callable[[], Stopped]:
    """Starts a watch of the host; what is called first stops it."""
    started = time.perf_counter()

    def stop() -> Stopped:
        seconds = time.perf_counter() - started
        return lambda: seconds

    return stop


class Backend(Protocol):
    """The stages of a model as functions of arrays. Called by one thread at a time, `prepare` and `describe` excepted."""

    name: str

    @property
    def lone_plans(self) -> Sequence[int]:
        """Numbers of steps whose whole plan `sample` draws from embeddings for one picture, faster than step by step."""
        ...

    @property
    def most_rows(self) -> int | None:
        """Of one call, where a larger one would run in parts, one after another; None where it would not."""
        ...

    @property
    def loras(self) -> Mapping[str, frozenset[str]]:
        """Those that `adapt` knows, by name the stages that each changes: text_encoder, denoiser."""
        ...

    def describe(self) -> str:
        """One line: library, device, precision, threads."""
        ...

    def stopwatch(self) -> Callable[[], Stopped]:
        """Starts a watch of the device's time; the seconds may be asked for after the pictures."""
        ...

    def prepare(self, graphs: Sequence[str], batches: Sequence[int] = (1,)) -> None:
        """Load these graphs now, so that the first request does not wait for them."""
        ...

    def adapt(self, loras: LoraSet) -> None:
        """The networks draw with these LoRAs, and no others, from now on."""
        ...

    def upload(self, values: NDArray[np.float32]) -> Array:
        """A copy of the values as the backend's array."""
        ...

    def join(self, arrays: Sequence[Array]) -> Array:
        """One batch out of several."""
        ...

    def encode(self, tokens: Mapping[str, NDArray[np.int64]]) -> Conditions:
        """Token ids and masks (B, L) by input name -> the conditions of the denoiser, each (B, ...)."""
        ...

    def encode_image(self, images: NDArray[np.uint8]) -> Array:
        """Images (B, H, W, 3) -> latents (B, C, h, w); asked of artifacts with an image encoder only."""
        ...

    def encode_condition(self, pictures: NDArray[np.uint8]) -> Conditions:
        """Conditioning pictures (B, H, W, 3) -> what the denoiser reads of them, each (B, ...); asked of models that have a
        ControlNet or T2I-adapter only."""
        ...

    def denoise(self, x: Array, timestep: NDArray[np.float32], conditions: Conditions) -> Array:
        """x (B, C, h, w), timestep (B,), conditions (B, ...) -> the network's output m (B, C, h, w)."""
        ...

    def update(self, x: Array, m: Array, a: Column, b: Column, fresh: Fresh = None) -> Array:
        """a x + b m, and + c z of fresh = (c, z), with one coefficient per image: a, b, c (B,), z as x. x stays as it is, since
        a failing turn is tried again."""
        ...

    def finite(self, x: Array) -> NDArray[np.bool_]:
        """Which of the images (B, ...) hold neither NaN nor Inf; waits for the device."""
        ...

    def decode(self, x: Array) -> Pictures:
        """Latents (B, C, h, w) -> images (B, H, W, 3) on the host, and which of them came without NaN and Inf."""
        ...

    def sample(self, graph: str, inputs: Sequence[Array], *noises: Array) -> Pictures:
        """A whole-sampler graph in one call: what it reads of the prompt, unit noise (B, C, h, w) and, of a plan that
        re-noises, that of its steps (B, k, C, h, w) -> as `decode`."""
        ...

    def close(self) -> None:
        """Free memory; the backend is not called again."""
        ...


def check_device(backend: str, device: str) -> None:
    """Raises ArtifactError for a device that no machine's backend of this name runs on."""
    known = [name.replace("N", r"\d+") for name in re.split(", | or ", DEVICES[backend])]
    if not any(re.fullmatch(name, device) for name in known):
        raise ArtifactError(f"device must be {DEVICES[backend]} for the backend {backend}, got {device!r}")
