"""The graphs on onnxruntime: its CPU provider, or another where it is installed. DirectML's and CoreML's were never run by
the project; on CUDA and TensorRT the arrays stay on the device (onnxruntime_device)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.errors import ArtifactError, missing_extra
from ...folders.manifests import ArtifactManifest
from ..processors import processors
from .base import BackendOptions
from .fed_weights import FedGraphs, FedWeights
from .graphs import Run
from .onnxruntime_providers import Provider, find_device, providers

LARGE = 200_000_000  # bytes of weights beyond which memory matters more than loading fast


class OnnxruntimeBackend(FedGraphs):
    """One session per graph, of any batch, with the state on the host. device: cpu, cuda, tensorrt, directml (each also with
    :N) or coreml; auto takes the CPU unless onnxruntime-gpu finds CUDA. The precision is the graphs' own."""

    name = "onnxruntime"
    lacks = ""  # the libraries that a provider needs and onnxruntime did not find

    def __init__(self, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> None:
        super().__init__(folder, manifest)
        self._library, (self.device, self._kind, self._index) = self.check(folder, manifest, options)
        self.threads = options.threads or processors()
        if options.loras:
            self.fed = FedWeights(folder, manifest, options.loras)

    @staticmethod
    def check(folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> tuple[Any, tuple[str, str, int]]:
        """The library; the device's name, its kind and number. Raises ArtifactError, MissingExtraError."""
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "cpu") from None
        if options.precision not in ("auto", manifest.precision):
            raise ArtifactError(
                f"onnxruntime computes in the graphs' own precision, {manifest.precision}; for {options.precision} run "
                f"'imagine-flash export STUDENT OUT --precision {options.precision}'"
            )
        found = find_device(onnxruntime, options.device)
        if options.loras and (found[1] not in ("cpu", "cuda") or manifest.precision == "bf16"):
            raise ArtifactError(
                f"onnxruntime swaps LoRAs on cpu and cuda in fp32 and fp16, not {manifest.precision} on {found[0]}; take the "
                "student with --backend torch, or fuse them: imagine-flash export --lora"
            )
        return onnxruntime, found

    def describe(self) -> str:
        threads = f", {self.threads} threads" if self._kind == "cpu" else ""
        return f"onnxruntime {self._library.__version__} on {self.device}, {self.manifest.precision}{threads}"

    def open(self, graph: str, batch: int) -> Run:
        session, fed = self._session(graph, self._providers(graph, batch)), self.fed_to(graph)
        names = [value.name for value in session.get_inputs() if value.name not in fed]
        return lambda inputs: session.run(None, {**dict(zip(names, inputs, strict=True)), **fed})

    def _providers(self, graph: str, batch: int) -> list[Provider]:
        is_fed, version = bool(self.fed_to(graph)), self._library.__version__
        return providers(self._kind, self._index, self.manifest, graph, batch, version, is_fed=is_fed)

    def _session(self, graph: str, given: list[Provider], batch: int = 0) -> Any:
        """A graph loaded by these providers, for this batch size alone where one is given. Raises ArtifactError where the first
        of them does not start."""
        options = self._library.SessionOptions()
        if batch:
            options.add_free_dimension_override_by_name("batch", batch)
        options.log_severity_level = 3 if self._kind == "cpu" else 4  # a graph that cannot be captured is no error
        options.intra_op_num_threads = self.threads
        large = max((path.stat().st_size for path in self.folder.glob("*.bin")), default=0) > LARGE
        # planning it takes five sixths of loading an unrolled graph: decision 004
        options.enable_mem_reuse = large or self._kind != "cpu"
        options.enable_mem_pattern = self._kind != "directml"  # which does not take it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others use these cores too
        path: Any = self.folder / self.manifest.graphs[graph].file
        if self.fed and self.fed_to(graph):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
            path = self.fed.graph(graph, path)
        # without its own fallback, which prints, and draws on the CPU
        session = self._library.InferenceSession(path, options, providers=given, enable_fallback=0)
        if (provider := given[0][0]) not in session.get_providers():
            why = f" ({self.lacks})" if self.lacks else ""
            raise ArtifactError(
                f"{provider} does not start here, often for want of CUDA's libraries{why}; take the device cpu"
            )
        return session
