"""LoRAs on the backends that run graphs: the weights that LoRAs change are inputs of the graphs, fed with every call.

So another set is another content of the same memory, which no graph has to be built for. The layers are found by the names of the
graphs' nodes, which say the module that each comes from; what the networks are made of, which the LoRAs are read by, is in the
artifact. Reading needs torch, diffusers, peft and onnx; drawing does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ArtifactError, missing_extra
from ...folders.manifests import ArtifactManifest
from .base import LoraSet
from .graphs import GraphBackend

READERS = ("MatMul", "Gemm", "Conv")
TEXT_ENCODER, DENOISER = "text_encoder", "denoiser"
Memory = dict[str, tuple[NDArray[Any], bool]]  # by layer, the weight and whether it is transposed


class FedGraphs(GraphBackend[ArtifactManifest]):
    """Graphs of an artifact on the host. fed: where there are LoRAs."""

    fed: FedWeights | None = None

    @property
    def loras(self) -> Mapping[str, frozenset[str]]:
        return {} if self.fed is None else self.fed.loras

    def adapt(self, loras: LoraSet) -> None:
        if self.fed is not None:
            self.fed.write(loras)

    def close(self) -> None:
        super().close()
        self.fed = None

    def fed_to(self, graph: str) -> Mapping[str, NDArray[Any]]:
        """The weights that a graph is fed beside its own inputs, by name; their memory stays the same."""
        return {} if self.fed is None else self.fed.of(graph)


class FedWeights:
    """The weights that these LoRAs change. loras: by name the stages that each changes."""

    def __init__(self, folder: Path, manifest: ArtifactManifest, files: Mapping[str, str]) -> None:
        """Raises ArtifactError, MissingExtraError."""
        try:
            import onnx
        except ImportError:
            raise missing_extra("onnx", "export") from None
        from .torch import Rewriter, lora_layers, torch

        self._onnx: Any = onnx
        self.folder = folder
        adapters, prefixes = lora_layers(folder, files)
        self.loras = {name: adapter.stages for name, adapter in adapters.items()}
        layers: dict[str, list[Any]] = defaultdict(list)
        for adapter in adapters.values():
            for path, layer in adapter.layers.items():
                layers[path].append(layer)
        self._arrays: dict[str, dict[str, NDArray[Any]]] = {}  # by graph, what is fed
        memory: Memory = {}  # shared by the graphs of all sizes
        for graph in manifest.graph_names:
            is_text = graph.startswith(TEXT_ENCODER)
            if is_text or graph.startswith(DENOISER):
                own = {
                    path: prefixes[path.partition(".")[0]]
                    for path in layers
                    if path.startswith(TEXT_ENCODER) == is_text
                }
                modules = {f"{prefix}.{path.partition('.')[2]}": path for path, prefix in own.items()}
                self._arrays[graph] = self._feed(folder / manifest.graphs[graph].file, modules, memory)
        for name, adapter in adapters.items():
            if memory.keys().isdisjoint(adapter.layers):
                raise ArtifactError(
                    f"{folder} has no graph of a stage that the LoRA {name!r} changes: export --stages, or both"
                )
        for path, (values, is_transposed) in memory.items():
            weight = torch.from_numpy(values)
            for layer in layers[path]:
                layer.get_base_layer().weight = torch.nn.Parameter(weight.T if is_transposed else weight, False)
        self._rewriter = Rewriter({name: adapter.of(memory) for name, adapter in adapters.items()})

    def write(self, loras: LoraSet) -> None:
        """Has the next calls draw with these, and no others."""
        if self._rewriter.written != dict(loras):
            self._rewriter.write(dict(loras))

    def of(self, graph: str) -> Mapping[str, NDArray[Any]]:
        """What a graph is fed, by name."""
        return self._arrays.get(graph, {})

    def graph(self, name: str, file: Path) -> bytes:
        """A graph whose weights of `of` are inputs, as ONNX that refers to the artifact's weights file."""
        model = self._onnx.load(str(file), load_external_data=False)
        fed, graph = self.of(name), model.graph
        gone = {one.input[0] for one in graph.node if one.output[0] in fed}
        nodes = [node for node in graph.node if node.output[0] not in fed]
        read = {value for node in nodes for value in node.input}
        initializers = [
            one for one in graph.initializer if one.name not in fed and (one.name not in gone or one.name in read)
        ]
        for field, kept in ((graph.node, nodes), (graph.initializer, initializers)):
            del field[:]
            field.extend(kept)
        for value, array in fed.items():
            kind = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(self._onnx.helper.make_tensor_value_info(value, kind, array.shape))
        return model.SerializeToString()

    def _feed(self, file: Path, modules: Mapping[str, str], memory: Memory) -> dict[str, NDArray[Any]]:
        """The weights of these modules in a graph, by the names that its nodes read; into `memory` those that are not there.
        Raises ArtifactError for one that no node reads as it is."""
        graph = self._onnx.load(str(file), load_external_data=False).graph
        tensors = {one.name: one for one in graph.initializer}
        casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast" and node.input[0] in tensors}
        readers: dict[str, set[str]] = defaultdict(set)  # modules, by what they read
        for node in graph.node:
            for value in node.input:
                readers[value].add(_module_of(node))
        found: dict[str, NDArray[Any]] = {}
        left = set(modules)
        for node in graph.node:
            module = _module_of(node)
            if module not in modules or node.op_type not in READERS:
                continue
            value, cast = node.input[1], casts.get(node.input[1])
            if (name := cast.input[0] if cast else value) not in tensors or readers[value] != {module}:
                continue  # no weight, or one that equals another's and is stored as that
            is_transposed = node.op_type == "MatMul" or (
                node.op_type == "Gemm" and not any(one.name == "transB" and one.i for one in node.attribute)
            )
            if modules[module] not in memory:
                kind = cast.attribute[0].i if cast else tensors[name].data_type
                memory[modules[module]] = self._read(tensors[name], kind), is_transposed
            elif memory[modules[module]][1] != is_transposed:
                continue
            found[value] = memory[modules[module]][0]
            left.discard(module)
        if lost := sorted(module for module in left if not _is_unread(module, graph)):
            raise ArtifactError(
                f"{file} does not hold the weight of {lost[0]}, which a LoRA changes, as one that can be replaced; take the "
                "student with --backend torch, or fuse it: imagine-flash export --lora"
            )
        return found

    def _read(self, tensor: Any, kind: int) -> NDArray[Any]:
        """A copy of its values, in the type that nodes read."""
        copy = self._onnx.TensorProto()
        copy.CopyFrom(tensor)
        if copy.external_data:
            self._onnx.external_data_helper.load_external_data_for_tensor(copy, str(self.folder))
        values = self._onnx.numpy_helper.to_array(copy)
        return np.array(values, self._onnx.helper.tensor_dtype_to_np_dtype(kind), order="C")


def _module_of(node: Any) -> str:
    return node.name.rpartition("/")[0]


def _is_unread(module: str, graph: Any) -> bool:
    """Whether nothing reads what the module's block gives, such as the last of a text encoder whose last but one is read: then
    the graph has no node of that block."""
    parts = module.split(".")
    blocks = [".".join(parts[: i + 1]) + "." for i, part in enumerate(parts) if part.isdigit()]
    return any(not any(node.name.startswith(block) for node in graph.node) for block in blocks)
