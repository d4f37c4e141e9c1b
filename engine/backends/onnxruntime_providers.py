"""onnxruntime's providers: which the device of a name means, and what they are told.

Every option is one that onnxruntime documents; an unknown one is an error at loading. None was ever tried on a GPU by the project.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from ...core.errors import ArtifactError
from ...folders.files import cache_folder
from ...folders.manifests import ArtifactManifest, GraphSpec
from .base import check_device

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "directml": "onnxruntime-directml"}
NVIDIA = ("cuda", "tensorrt")  # where arrays stay on the device
UNCAPTURED = {"CUDAExecutionProvider": "enable_cuda_graph", "TensorrtExecutionProvider": "trt_cuda_graph_enable"}

DRIVER = "/dev/nvidiactl"

Provider = tuple[str, dict[str, Any]]


def is_nvidia(device: str) -> bool:
    """Whether a device of this name is NVIDIA's, to which auto belongs where onnxruntime-gpu and a driver are."""
    if device == "auto" and importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        device = _automatic(onnxruntime)
    return device.partition(":")[0] in NVIDIA


def _automatic(library: Any) -> str:
    return "cuda" if PROVIDERS["cuda"] in library.get_available_providers() and os.path.exists(DRIVER) else "cpu"


def find_device(library: Any, device: str) -> tuple[str, str, int]:
    """The device's name, its kind and its number. Raises ArtifactError for one whose provider is not there."""
    there = library.get_available_providers()
    if device == "auto":
        device = _automatic(library)
    check_device("onnxruntime", device)
    kind, _, index = device.partition(":")
    if PROVIDERS[kind] not in there:
        way = "take a build of it that has (macOS)"
        if kind in PACKAGES:
            way = f"pip uninstall onnxruntime and pip install {PACKAGES[kind]}"
        raise ArtifactError(
            f"this onnxruntime has no {PROVIDERS[kind]} for the device {device!r}; {way}, or take the device cpu"
        )
    return device, kind, int(index or 0)


def providers(
    kind: str, index: int, manifest: ArtifactManifest, graph: str, batches: Sequence[int], version: str
) -> list[Provider]:
    """What onnxruntime is given to load a graph for a device of this kind; batches: those that it will see."""
    if kind == "cpu":
        return [(PROVIDERS["cpu"], {})]
    if kind == "coreml":
        return [(PROVIDERS["coreml"], {}), (PROVIDERS["cpu"], {})]
    if kind == "directml":
        return [(PROVIDERS["directml"], {"device_id": index}), (PROVIDERS["cpu"], {})]
    chosen = [(PROVIDERS["cuda"], cuda_options(index, captures=kind == "cuda"))]
    if kind == "tensorrt":
        chosen.insert(0, (PROVIDERS["tensorrt"], tensorrt_options(index, manifest, graph, batches, version)))
    return [*chosen, (PROVIDERS["cpu"], {})]


def uncaptured(chosen: Sequence[Provider]) -> list[Provider]:
    """The same without CUDA graphs."""
    return [(name, {key: told[key] for key in told if key != UNCAPTURED.get(name)}) for name, told in chosen]


def cuda_options(index: int, *, captures: bool) -> dict[str, Any]:
    """Of the CUDA provider. Float32 stays float32 (use_tf32 is on by default and keeps ten bits of it); convolutions are
    channels_last and timed once per shape, when a graph is loaded; memory grows by what is asked for, since each graph has its
    own."""
    return {
        "device_id": index,
        "enable_cuda_graph": int(captures),
        "prefer_nhwc": 1,
        "use_tf32": 0,
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": 1,
        "arena_extend_strategy": "kSameAsRequested",
    }


def tensorrt_options(
    index: int, manifest: ArtifactManifest, graph: str, batches: Sequence[int], version: str
) -> dict[str, Any]:
    """Of the TensorRT provider: one engine a graph for all batches, optimised for one picture; engines and the times of kernels
    are kept in the user's cache folder, by content, since the names of their files don't tell weights apart."""
    told: dict[str, Any] = {
        "device_id": index,
        "trt_cuda_graph_enable": 1,
        "trt_fp16_enable": int(manifest.precision == "fp16"),
        "trt_bf16_enable": int(manifest.precision == "bf16"),
        "trt_layer_norm_fp32_fallback": int(manifest.precision != "fp32"),
        **_profiles(manifest, manifest.graphs[graph], batches),
    }
    key = f"{version} {manifest.sha256} {sorted(manifest.files.items())} {graph} {sorted(told.items())}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    if cache := cache_folder(f"onnxruntime/{digest}"):
        told |= {"trt_engine_cache_enable": 1, "trt_engine_cache_path": str(cache)}
    if times := cache_folder("onnxruntime/timings"):
        told |= {"trt_timing_cache_enable": 1, "trt_timing_cache_path": str(times)}
    return told


def _profiles(manifest: ArtifactManifest, spec: GraphSpec, batches: Sequence[int]) -> dict[str, str]:
    """The smallest, usual and largest shapes of a graph's inputs; none where nothing is free."""
    if not any(isinstance(side, str) for value in spec.inputs for side in value.shape):
        return {}
    size, any_size = manifest.sizes[0], manifest.any_size
    least = (any_size.smallest, any_size.smallest) if any_size else size
    most = (any_size.largest, any_size.largest) if any_size else size
    ends = {"min": (batches[0], least), "opt": (batches[0], size), "max": (batches[-1], most)}

    def shapes(batch: int, size: tuple[int, int]) -> str:
        return ",".join(f"{value.name}:{'x'.join(map(str, value.at(batch, size)))}" for value in spec.inputs)

    return {f"trt_profile_{end}_shapes": shapes(*asked) for end, asked in ends.items()}


def load_cuda(library: Any) -> str:
    """Loads NVIDIA's libraries from their pip packages, where they are installed so -> what onnxruntime says about those that it
    does not find."""
    with redirect_stdout(io.StringIO()) as said:  # it prints
        library.preload_dlls()
    return " ".join(said.getvalue().split())
