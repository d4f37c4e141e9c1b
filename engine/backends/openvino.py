"""The graphs on OpenVINO, compiled for fixed shapes: on a CPU the fastest on x86. Intel's GPUs and NPUs, by name, were never
run by the project.

The stages' IR is read where the artifact holds it, else the ONNX graphs, which OpenVINO reads itself; an IR of 8 bits is
the precision int8, whose other layers compute in bfloat16 where the processor has it. Compiled models are
kept in a cache folder of their device and precision: OpenVINO's own keys hold the model's content, shapes, version and
processor, but not the precision (2026.4), and a model compiled for float32 gave NaN when it was read for bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ArtifactError, missing_extra
from ...folders.files import cache_folder
from ...folders.manifests import ArtifactManifest, TensorSpec
from ..processors import processors
from .base import BackendOptions, check_device
from .fed_weights import FedGraphs, FedWeights
from .graphs import Run
from .openvino_rewrites import rewrite

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
LARGE = 2**29  # bytes of an artifact


class OpenvinoBackend(FedGraphs):
    """One compiled model per graph and batch size. device: cpu (auto), gpu, gpu:N or npu. precision: fp32, bf16 on a CPU that
    has it, fp16 elsewhere, or int8 where the artifact holds it; auto is int8, else fp32 on a CPU and fp16 elsewhere."""

    name = "openvino"

    def __init__(self, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> None:
        super().__init__(folder, manifest)
        self._library, self._core, self.precision = self.check(folder, manifest, options)
        self.device = _plugin(options.device)
        # each batch size takes the weights once more, and a large network gains nothing by it
        self.splits = self._large = sum((folder / name).stat().st_size for name in manifest.files) > LARGE
        self.batches = options.batches[:1] if self.splits else options.batches
        hint = HINTS[self._rest()]
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        self._threads = options.threads or processors()
        if self.device == "CPU":
            self._options["INFERENCE_NUM_THREADS"] = self._threads
        if cache := cache_folder(f"openvino/{self.device.lower()}-{hint}"):
            self._options["CACHE_DIR"] = str(cache)
        if options.loras:
            self.fed = FedWeights(folder, manifest, options.loras)

    @staticmethod
    def check(folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> tuple[Any, Any, str]:
        """The library, its core and the precision. Raises ArtifactError, MissingExtraError."""
        try:
            import openvino
        except ImportError:
            raise missing_extra("openvino", "cpu") from None
        check_device("openvino", options.device)
        if manifest.precision != "fp32":
            raise ArtifactError(
                f"OpenVINO lowers the precision itself; this artifact's graphs are {manifest.precision}, export with "
                "--precision fp32, or take the backend onnxruntime"
            )
        core = openvino.Core()
        there = [name.lower().replace(".", ":") for name in core.available_devices]
        if not any(options.device in (name, name.partition(":")[0]) for name in (*there, "auto")):
            raise ArtifactError(
                f"OpenVINO finds no {options.device!r} here, only {', '.join(there)}; install its driver, or take the device cpu"
            )
        return openvino, core, _precision(core, folder, manifest, options)

    def _rest(self) -> str:
        """The precision of what is not in 8 bits."""
        if self.precision != "int8":
            return self.precision
        kinds = self._core.get_property(self.device, "OPTIMIZATION_CAPABILITIES")
        return "fp16" if self.device != "CPU" else "bf16" if "BF16" in kinds else "fp32"

    def describe(self) -> str:
        version = self._library.__version__.split("-")[0]
        threads = f", {self._threads} threads" if self.device == "CPU" else ""
        return f"openvino {version} on {self.device.lower()}, {self.precision}{threads}"

    def open(self, graph: str, batch: int) -> Run:
        model = self._core.read_model(self._file(graph))
        spec = self.manifest.graphs[graph]
        model.reshape({value.name: self._shape(value, batch) for value in spec.inputs})
        fed = self.fed_to(graph)
        self._make_inputs(model, graph, fed)
        if self.device == "CPU":
            rewrite(model)
        compiled = self._core.compile_model(model, self.device, self._options)
        if self._large and "CACHE_DIR" in self._options and not compiled.get_property("LOADED_FROM_CACHE"):
            del (
                compiled
            )  # from the cache its float32 weights are pages of a file: 3.5 instead of 7.9 GiB of a 1.2 G model
            compiled = self._core.compile_model(model, self.device, self._options)
        request = compiled.create_infer_request()
        names = [port.names for port in compiled.inputs]  # several, where a graph hands an input on under another name
        inputs = [*(value.name for value in spec.inputs), *fed]
        order = [next(i for i, known in enumerate(names) if name in known) for name in inputs]
        outputs = [compiled.output(value.name) for value in spec.outputs]

        def run(inputs: Any) -> list[np.ndarray]:
            feed = dict(zip(order, [*inputs, *fed.values()], strict=True))
            found = request.infer(feed, share_inputs=True, share_outputs=False)
            return [found[port] for port in outputs]

        return run

    def _shape(self, value: TensorSpec, batch: int) -> list[Any]:
        """What an input is compiled for: so many pictures and, of any size, the range of its sides."""
        if self.manifest.any_size is None:
            return [batch if each == "batch" else each for each in value.shape]
        least, most = self.manifest.any_size.smallest, self.manifest.any_size.largest
        ends = zip(value.at(batch, (least, least)), value.at(batch, (most, most)), strict=True)
        return [self._library.Dimension(low, high) for low, high in ends]

    def _make_inputs(self, model: Any, graph: str, fed: Mapping[str, NDArray[Any]]) -> None:
        """Makes these weights of a model inputs of their names. Raises ArtifactError for one that it does not hold as it is."""
        found = {
            name: port for op in model.get_ops() for port in op.outputs() for name in port.get_names() if name in fed
        }
        for name, values in fed.items():
            port = found.get(name)
            if port is None or list(port.get_shape()) != list(values.shape):
                raise ArtifactError(
                    f"the OpenVINO graph {self._file(graph).name} does not hold the weight {name}, which a LoRA changes, as it "
                    "was exported (int8 weights are not); take the backend onnxruntime"
                )
            given = self._library.opset13.parameter(values.shape, values.dtype, name)
            readers = port.get_target_inputs()
            port.set_names(set())
            given.output(0).set_names({name})
            for reader in readers:
                reader.replace_source_output(given.output(0))
            model.add_parameters([given])

    def _file(self, graph: str) -> Path:
        """The IR of a graph where the artifact has one of this precision, else its ONNX."""
        fits = (self.precision == "int8") == self.manifest.holds_int8
        graphs = self.manifest.formats.get("openvino", {}).get("graphs", {}) if fits else {}
        file = graphs.get(graph, {}).get("file", self.manifest.graphs[graph].file)
        return self.folder / file


def _precision(core: Any, folder: Path, manifest: ArtifactManifest, options: BackendOptions) -> str:
    """What it computes in. Raises ArtifactError for what the device or the artifact does not have."""
    on_cpu = _plugin(options.device) == "CPU"
    automatic = "int8" if manifest.holds_int8 and not options.loras else "fp32" if on_cpu else "fp16"
    precision = automatic if options.precision == "auto" else options.precision
    if options.loras and precision == "int8":
        raise ArtifactError("OpenVINO swaps no LoRAs in int8; take fp32 or bf16")
    kinds = core.get_property(_plugin(options.device), "OPTIMIZATION_CAPABILITIES")
    computes = [name for name in HINTS if name.upper() in kinds and not (on_cpu and name == "fp16")]
    if precision == "int8" and not manifest.holds_int8:
        raise ArtifactError(
            f"{folder} holds nothing in int8; run: imagine-flash export STUDENT OUT --format openvino --int8 full"
        )
    if precision not in ("int8", *computes):
        where = "this CPU" if on_cpu else options.device
        raise ArtifactError(f"OpenVINO on {where} computes in {', '.join(computes)}, not {precision}")
    return precision


def _plugin(device: str) -> str:
    """OpenVINO's name of a device: CPU, GPU.1, NPU."""
    return "CPU" if device == "auto" else device.upper().replace(":", ".")


def processor_with_bf16() -> str | None:
    """OpenVINO's version and the processor's name, if it computes in bfloat16; else None."""
    import openvino

    core = openvino.Core()
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return f"openvino {openvino.__version__} {core.get_property('CPU', 'FULL_DEVICE_NAME')}" if native else None
