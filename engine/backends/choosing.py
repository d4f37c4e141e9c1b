"""Which backend runs a model. Each is imported only when it is chosen."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

from ...core.errors import ArtifactError, ImagineFlashError, nearest
from ...folders.files import ARTIFACT_FILE, STUDENT_FILE
from ...folders.manifests import WHOLE_SAMPLER, ArtifactManifest
from ...folders.tensorrt_plans import find_plan
from .base import BACKENDS, STUDENT_BACKENDS, Backend, BackendOptions


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
        "openvino": manifest.precision == "fp32" and device.partition(":")[0] in ("auto", "cpu", "gpu", "npu"),
    }
    return next((here for here in installed() if takes.get(here, True)), "onnxruntime")


def _has_plans(folder: Path, manifest: ArtifactManifest) -> bool:
    """Whether TensorRT plans of all stages, or without stages of all samplers, fit this machine."""
    packages = (importlib.util.find_spec(name) is not None for name in ("tensorrt", "torch"))
    if not (all(packages) and os.path.exists("/dev/nvidiactl")):
        return False
    stages = [name for name in manifest.graphs if not name.startswith(WHOLE_SAMPLER)]
    try:
        return all(find_plan(folder, name) is not None for name in stages or manifest.graphs)
    except ImagineFlashError:  # plans of another machine
        return False


def load_backend(name: str, folder: Path, manifest: ArtifactManifest, options: BackendOptions | None = None) -> Backend:
    """The backend called `name`, or what "auto" means. Raises ArtifactError, MissingExtraError."""
    options = options or BackendOptions()
    chosen = choose(name, manifest, options.device, folder)
    return _backend(chosen, options.device)(folder, manifest, options)


def check_backend(name: str, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> None:
    """What `load_backend` would find wrong before it reads a graph: a package, a device, a precision that is not here.
    Raises ArtifactError, MissingExtraError."""
    chosen = choose(name, manifest, options.device, folder)
    _backend(chosen, options.device).check(folder, manifest, options)


def _backend(name: str, device: str) -> Any:
    if name == "tensorrt":
        from .tensorrt import TensorrtBackend

        return TensorrtBackend
    if name == "openvino":
        from .openvino import OpenvinoBackend

        return OpenvinoBackend
    from .onnxruntime import OnnxruntimeBackend
    from .onnxruntime_providers import is_nvidia

    if not is_nvidia(device):
        return OnnxruntimeBackend
    from .onnxruntime_device import OnnxruntimeOnDevice

    return OnnxruntimeOnDevice
