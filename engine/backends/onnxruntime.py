"""The graphs on onnxruntime: its CPU provider, or another where it is installed. DirectML's and CoreML's were never run by
the project."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...core.errors import ArtifactError, missing_extra
from ...folders.manifests import ArtifactManifest
from ..processors import processors
from .base import BackendOptions, check_device
from .fed_weights import FedGraphs, FedWeights
from .graphs import Run

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "directml": "onnxruntime-directml"}
LARGE = 200_000_000  # bytes of weights beyond which memory matters more than loading fast


class OnnxruntimeBackend(FedGraphs):
    """One session per graph, of any batch. device: cpu, cuda, tensorrt, directml (each also with :N) or coreml; auto takes
    the CPU unless onnxruntime-gpu finds CUDA. The precision is the graphs' own. CUDA graphs stay off: the state lives on the
    host."""

    name = "onnxruntime"

    def __init__(self, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> None:
        super().__init__(folder, manifest)
        self._library, self.device, self._providers = self.check(folder, manifest, options)
        self.threads = options.threads or processors()
        if options.loras:
            self.fed = FedWeights(folder, manifest, options.loras)

    @staticmethod
    def check(folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> tuple[Any, str, list[Any]]:
        """The library, the device's name and its providers. Raises ArtifactError, MissingExtraError."""
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "cpu") from None
        if options.precision not in ("auto", manifest.precision):
            raise ArtifactError(
                f"onnxruntime computes in the graphs' own precision, {manifest.precision}; for {options.precision} run "
                f"'imagine-flash export STUDENT OUT --precision {options.precision}'"
            )
        device, providers = _providers(onnxruntime, options.device)
        if options.loras and (device != "cpu" or manifest.precision == "bf16"):
            raise ArtifactError(
                f"onnxruntime swaps LoRAs on the cpu in fp32 and fp16, not {manifest.precision} on {device}; take the student with "
                "--backend torch, or fuse them: imagine-flash export --lora"
            )
        return onnxruntime, device, providers

    def describe(self) -> str:
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        return f"onnxruntime {self._library.__version__} on {self.device}, {self.manifest.precision}{threads}"

    def open(self, graph: str, batch: int) -> Run:
        options = self._library.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        large = max(map(_size, self.folder.glob("*.bin")), default=0) > LARGE
        options.enable_mem_reuse = large  # planning it takes five sixths of loading an unrolled graph: decision 004
        options.enable_mem_pattern = not self.device.startswith("directml")  # which does not take it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others use these cores too
        path: Any = self.folder / self.manifest.graphs[graph].file
        fed = self.fed_to(graph)
        if self.fed and fed:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
            path = self.fed.graph(graph, path)
        session = self._library.InferenceSession(path, options, providers=self._providers)
        if (provider := self._providers[0]) != PROVIDERS["cpu"] and provider[0] not in session.get_providers():
            raise ArtifactError(
                f"{provider[0]} does not start here, often for want of CUDA's libraries; take the device cpu"
            )
        names = [value.name for value in session.get_inputs() if value.name not in fed]
        return lambda inputs: session.run(None, {**dict(zip(names, inputs, strict=True)), **fed})


def _providers(library: Any, device: str) -> tuple[str, list[Any]]:
    """The device's name and onnxruntime's providers for it. Raises ArtifactError for one that is not there."""
    there = library.get_available_providers()
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"] in there and os.path.exists("/dev/nvidiactl") else "cpu"
    check_device("onnxruntime", device)
    kind, _, index = device.partition(":")
    if PROVIDERS[kind] not in there:
        way = "take a build of it that has (macOS)"
        if kind in PACKAGES:
            way = f"pip uninstall onnxruntime and pip install {PACKAGES[kind]}"
        raise ArtifactError(
            f"this onnxruntime has no {PROVIDERS[kind]} for the device {device!r}; {way}, or take the device cpu"
        )
    chosen = {"tensorrt": ["tensorrt", "cuda"], "cpu": []}.get(kind, [kind])
    told: dict[str, int] = {} if kind == "coreml" else {"device_id": int(index or 0)}
    return device, [*((PROVIDERS[name], told) for name in chosen), PROVIDERS["cpu"]]


def _size(path: Path) -> int:
    return path.stat().st_size
