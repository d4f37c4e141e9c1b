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
from ...folders.manifests import ArtifactManifest, GraphSpec, Size
from .base import check_device

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "directml": "onnxruntime-directml"}
INSTALLS = {  # never beside onnxruntime, which is the same Python module
    "onnxruntime-gpu": "pip install 'imagine-flash[cuda]', in a checkout '.[cuda]'",
    "onnxruntime-directml": "pip install onnxruntime-directml",
}
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
            way = f"{PACKAGES[kind]} has it, in a fresh environment: {INSTALLS[PACKAGES[kind]]}"
        raise ArtifactError(
            f"this onnxruntime has no {PROVIDERS[kind]} for the device {device!r}; {way}, or take the device cpu"
        )
    return device, kind, int(index or 0)


def providers(
    kind: str, index: int, manifest: ArtifactManifest, graph: str, batch: int, version: str, *, is_fed: bool = False
) -> list[Provider]:
    """What onnxruntime is given to load a graph for a device of this kind. batch: the only one that it will see; 0: any. is_fed:
    some of its weights are inputs."""
    if kind == "cpu":
        return [(PROVIDERS["cpu"], {})]
    if kind == "coreml":
        return [(PROVIDERS["coreml"], {}), (PROVIDERS["cpu"], {})]
    if kind == "directml":
        return [(PROVIDERS["directml"], numbered(index)), (PROVIDERS["cpu"], {})]
    is_fixed = bool(batch) and not is_fed
    told = cuda_options(index, manifest.precision, manifest.graphs[graph], captures=kind == "cuda", is_fixed=is_fixed)
    chosen = [(PROVIDERS["cuda"], told)]
    if kind == "tensorrt":
        chosen.insert(0, (PROVIDERS["tensorrt"], tensorrt_options(index, manifest, graph, batch, version)))
    return [*chosen, (PROVIDERS["cpu"], {})]


def numbered(index: int) -> dict[str, int]:
    """Which device; the first goes unsaid, since onnxruntime 1.31 warns of every number on standard error."""
    return {"device_id": index} if index else {}


def uncaptured(chosen: Sequence[Provider]) -> list[Provider]:
    """The same without CUDA graphs."""
    return [(name, {key: told[key] for key in told if key != UNCAPTURED.get(name)}) for name, told in chosen]


def cuda_options(
    index: int, precision: str, spec: GraphSpec, *, captures: bool, is_fixed: bool = True
) -> dict[str, Any]:
    """Of the CUDA provider. Convolutions are timed once, when a graph is loaded; memory grows by what is asked for, since each
    graph has its own.

    Float32 stays float32 to the last bits, which the default, TF32, drops. In half precision TF32 is on, since off means no tensor
    cores at all, whatever the type. And convolutions are channels_last, as tensor cores read them, where all shapes and weights
    are known at loading (is_fixed) and there is no GroupNormalization, for which the provider has no kernel. Else it computes some
    shapes on the processor and some on the device, which is 110 copies in a small UNet, and it refuses weights that are fed.
    """
    half = precision != "fp32"
    return {
        **numbered(index),
        "enable_cuda_graph": captures,
        "prefer_nhwc": half and is_fixed and "GroupNormalization" not in spec.nodes,
        "use_tf32": half,
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": True,
        "arena_extend_strategy": "kSameAsRequested",
    }


def tensorrt_options(index: int, manifest: ArtifactManifest, graph: str, batch: int, version: str) -> dict[str, Any]:
    """Of the TensorRT provider. Engines and the times of kernels are kept in the user's cache folder, by content, since the names
    of their files don't tell weights apart."""
    told: dict[str, Any] = {
        **numbered(index),
        "trt_cuda_graph_enable": True,
        "trt_fp16_enable": manifest.precision == "fp16",
        "trt_bf16_enable": manifest.precision == "bf16",
        "trt_layer_norm_fp32_fallback": manifest.precision != "fp32",
        **_profiles(manifest, manifest.graphs[graph], batch),
    }
    key = f"{version} {sorted(manifest.files.items())} {graph} {batch} {sorted(told.items())}"
    if cache := cache_folder(f"onnxruntime/{hashlib.sha256(key.encode()).hexdigest()[:32]}"):
        told |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache)}
    if times := cache_folder("onnxruntime/timings"):
        told |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(times)}
    return told


def _profiles(manifest: ArtifactManifest, spec: GraphSpec, batch: int) -> dict[str, str]:
    """The smallest, usual and largest shapes of a graph of any size, for which one engine is built; none where the shapes are
    fixed, with the batch."""
    if batch or manifest.any_size is None:
        return {}
    low, high = manifest.batch
    least, most = manifest.any_size.smallest, manifest.any_size.largest
    ends = {"min": (low, (least, least)), "opt": (low, manifest.sizes[0]), "max": (high, (most, most))}

    def shapes(batch: int, size: Size) -> str:
        return ",".join(f"{value.name}:{'x'.join(map(str, value.at(batch, size)))}" for value in spec.inputs)

    return {f"trt_profile_{end}_shapes": shapes(*asked) for end, asked in ends.items()}


def load_cuda(library: Any, kind: str) -> str:
    """Loads NVIDIA's libraries, from their pip packages where they are installed so -> what onnxruntime says about those that it
    does not find."""
    with redirect_stdout(io.StringIO()) as said:  # it prints
        library.preload_dlls()
    if kind == "tensorrt" and importlib.util.find_spec("tensorrt") is not None:
        importlib.import_module("tensorrt")  # which loads its own
    return " ".join(said.getvalue().split())[:200]
