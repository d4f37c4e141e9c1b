"""What an engine needs of a backend, and which ones there are. Each is imported only when it is chosen."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ArtifactError, ImagineFlashError, nearest
from ...folders.files import ARTIFACT_FILE, STUDENT_FILE
from ...folders.manifests import ArtifactManifest
from ...folders.tensorrt_plans import find_plan

BACKENDS = ("tensorrt", "openvino", "onnxruntime")  # run artifacts
STUDENT_BACKENDS = ("torch", "torch-compile", "torch-graph")  # run student folders
STUDENT_BATCHES = (1, 63)
DEVICES = {
    "tensorrt": "auto, cuda or cuda:0",
    "openvino": "auto or cpu",
    "torch": "auto, cpu, cuda or cuda:N",
    "onnxruntime": "auto, cpu, cuda, cuda:N, tensorrt or tensorrt:N",
}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
Array = (
    Any  # the backend's own kind, batch first: of NumPy, or of torch on a device; sliced by [i:j], added, multiplied
)
Conditions = tuple[Array, ...]  # what the text encoder gives the denoiser, each (B, ...)
Pictures = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # images (B, H, W, 3); finite (B,)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a backend is asked for. batches: the batch sizes it will see most, increasing; the last is the largest.
    threads: processor threads of a network call; None leaves it to the backend, which takes all it may use.

    Raises ArtifactError for an unknown precision, or less than one thread.
    """

    device: str = "auto"
    precision: str = "auto"
    batches: tuple[int, ...] = (1,)
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ArtifactError(f"no precision {self.precision!r}{nearest(self.precision, PRECISIONS)}; known: {known}")
        if self.threads is not None and self.threads < 1:
            raise ArtifactError(f"threads must be at least 1, got {self.threads}")


class Backend(Protocol):
    """The stages of a model as functions of arrays. Called by one thread at a time, `prepare` and `describe` excepted."""

    name: str

    def describe(self) -> str:
        """One line: library, device, precision, threads."""
        ...

    def prepare(self, graphs: Sequence[str], batches: Sequence[int] = (1,)) -> None:
        """Load these graphs now, so that the first request does not wait for them."""
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

    def denoise(self, x: Array, timestep: NDArray[np.float32], conditions: Conditions) -> Array:
        """x (B, C, h, w), timestep (B,), conditions (B, ...) -> the network's output m (B, C, h, w)."""
        ...

    def update(self, x: Array, m: Array, a: NDArray[np.float32], b: NDArray[np.float32]) -> Array:
        """a x + b m with one coefficient per image: a, b (B,). x stays as it is, since a failing turn is tried again."""
        ...

    def finite(self, x: Array) -> NDArray[np.bool_]:
        """Which of the images (B, ...) hold neither NaN nor Inf; waits for the device."""
        ...

    def decode(self, x: Array) -> Pictures:
        """Latents (B, C, h, w) -> images (B, H, W, 3) on the host, and which of them came without NaN and Inf."""
        ...

    def sample(self, graph: str, inputs: Sequence[Array], noise: Array) -> Pictures:
        """A whole-sampler graph in one call: what it reads of the prompt, and x_T (B, C, h, w) -> as `decode`."""
        ...

    def close(self) -> None:
        """Free memory; the backend is not called again."""
        ...


def installed() -> list[str]:
    """The backends whose package is there, the one expected to be fastest on this machine first."""
    here = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        here.sort(key=lambda name: name == "openvino")  # its speed was measured on x86 alone
    return here


def runs_student(name: str, folder: Path) -> bool:
    """Whether `folder` is to be read as a student: by the backend's name, and with "auto" by what is in it.

    Raises ArtifactError for a name that is not known, or a student where the backend runs artifacts.
    """
    _check_name(name)
    is_student = (folder / STUDENT_FILE).is_file() and not (folder / ARTIFACT_FILE).is_file()
    if is_student and name in BACKENDS:
        raise ArtifactError(
            f"{folder} is a student, not an artifact; run: imagine-flash export {folder} OUT, or take backend 'torch'"
        )
    return is_student or name in STUDENT_BACKENDS


def check_device(backend: str, device: str) -> None:
    """Raises ArtifactError for a device that no machine's backend of this name runs on."""
    known = [name.replace("N", r"\d+") for name in re.split(", | or ", DEVICES[backend])]
    if not any(re.fullmatch(name, device) for name in known):
        raise ArtifactError(f"device must be {DEVICES[backend]} for the backend {backend}, got {device!r}")


def _check_name(name: str) -> None:
    known = ("auto", *BACKENDS, *STUDENT_BACKENDS)
    if name not in known:
        raise ArtifactError(f"no backend {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def choose(name: str, manifest: ArtifactManifest, device: str = "auto", folder: Path | None = None) -> str:
    """The backend meant by `name`: "auto" is the fastest one installed that takes this artifact. Raises ArtifactError.

    Without the artifact's folder, auto knows of no TensorRT plans.
    """
    _check_name(name)
    if name in STUDENT_BACKENDS:
        raise ArtifactError(f"{name} runs a student folder, not an artifact; give the student, or another backend")
    if name != "auto":
        return name
    takes = {
        "tensorrt": folder is not None and device in ("auto", "cuda", "cuda:0") and _has_plans(folder, manifest),
        "openvino": manifest.precision == "fp32" and device in ("auto", "cpu"),
    }
    return next((here for here in installed() if takes.get(here, True)), "onnxruntime")


def _has_plans(folder: Path, manifest: ArtifactManifest) -> bool:
    """Whether TensorRT plans of all stages, or without stages of all samplers, fit this machine."""
    packages = (importlib.util.find_spec(name) is not None for name in ("tensorrt", "torch"))
    if not (all(packages) and os.path.exists("/dev/nvidiactl")):
        return False
    stages = [name for name in manifest.graphs if not name.startswith("sampler_")]
    try:
        return all(find_plan(folder, name) is not None for name in stages or manifest.graphs)
    except ImagineFlashError:  # plans of another machine
        return False


def load_backend(name: str, folder: Path, manifest: ArtifactManifest, wanted: Wanted | None = None) -> Backend:
    """The backend called `name`, or what "auto" means. Raises ArtifactError, MissingExtraError."""
    wanted = wanted or Wanted()
    chosen = choose(name, manifest, wanted.device, folder)
    if chosen == "tensorrt":
        from .tensorrt import TensorrtBackend

        return TensorrtBackend(folder, manifest, wanted)
    if chosen == "openvino":
        from .openvino import OpenvinoBackend

        return OpenvinoBackend(folder, manifest, wanted)
    from .onnxruntime import OnnxruntimeBackend

    return OnnxruntimeBackend(folder, manifest, wanted)
