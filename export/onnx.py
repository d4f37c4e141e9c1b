"""One stage as an ONNX graph: torch.onnx (dynamo), stripped of everything that is not arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import GraphSpec, TensorSpec
from ..core.errors import ArtifactError, missing_extra
from .stages import Stages, quiet
from .weights import INLINE_BYTES, WeightRef, WeightStore, attach

try:
    import onnx
    import onnx_ir as ir
    import onnxscript  # noqa: F401  (torch.onnx needs it)
    import torch
    from onnx import TensorProto, helper
except ImportError as error:
    raise missing_extra(error.name or "onnx", "export") from None

OPSET = 20  # faster to run and twice as fast to load on a CPU as 23; docs/decisions/004-onnx-on-cpu.md has the numbers
BATCH = "batch"
IR_VERSION = 10
EXAMPLE_BATCH = 2  # torch.export specialises sizes 0 and 1
DTYPES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}


@dataclass(frozen=True)
class StageGraph:
    """A graph without its large weights, which lie in the store under the names the nodes use."""

    graph: onnx.GraphProto
    weights: dict[str, WeightRef]
    opset: int


def export_stages(stages: Stages, store: WeightStore, *, opset: int = OPSET) -> dict[str, StageGraph]:
    """Every stage as a graph whose first axes are free ("batch"). Raises ArtifactError if torch fixed one."""
    b, (c, h, w), length = EXAMPLE_BATCH, stages.latent_shape, stages.context_length
    ids = torch.zeros(b, length, dtype=torch.int64)
    latents, timestep = torch.zeros(b, c, h, w), torch.full((b,), 999.0)
    with torch.inference_mode():
        embeddings = stages.text_encoder(ids).clone()
    inputs = {
        "text_encoder": {"input_ids": ids},
        "denoiser": {"latents": latents, "timestep": timestep, "embeddings": embeddings},
        "decoder": {"latents": latents},
    }
    outputs = {"text_encoder": "embeddings", "denoiser": "m", "decoder": "images"}
    return {name: _export_stage(getattr(stages, name), inputs[name], outputs[name], store, opset) for name in inputs}


def save_graph(stage: StageGraph, path: Path) -> GraphSpec:
    """Writes one ONNX file that refers to the weights file beside it; returns what the manifest says about it."""
    graph = onnx.GraphProto()
    graph.CopyFrom(stage.graph)
    graph.name = path.stem
    attach(graph, stage.weights)
    opsets = [helper.make_opsetid("", stage.opset)]
    model = helper.make_model(graph, producer_name="imagine-flash", opset_imports=opsets, ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    specs = [[_tensor_spec(value) for value in values] for values in (graph.input, graph.output)]
    return GraphSpec(file=path.name, inputs=specs[0], outputs=specs[1], opset=stage.opset)


def _export_stage(
    module: torch.nn.Module, inputs: dict[str, torch.Tensor], output: str, store: WeightStore, opset: int
) -> StageGraph:
    batch = torch.export.Dim(BATCH, min=1, max=1024)
    with quiet():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    assert program is not None
    stage = _take_weights(program.model, store, opset)
    for value in (*stage.graph.input, *stage.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise ArtifactError(f"torch fixed the batch of {value.name!r} at {first.dim_value}; it must be free")
        first.dim_param = BATCH
    return stage


def _take_weights(model: ir.Model, store: WeightStore, opset: int) -> StageGraph:
    """Moves large float32 initializers to the store, then strips names of files, stack traces and inferred shapes."""
    weights: dict[str, WeightRef] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None, name
        if tensor.dtype == ir.DataType.FLOAT and tensor.nbytes > INLINE_BYTES:
            weights[name] = store.add(tensor.numpy())
            value.const_value = ir.Tensor(np.zeros(0, np.float32), name=name)  # a place holder, dropped below
    proto = ir.to_proto(model)
    if proto.functions:
        raise ArtifactError(f"torch left the function {proto.functions[0].name!r} in the graph; it must be plain ONNX")
    graph = onnx.GraphProto(name=proto.graph.name)
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ArtifactError(f"the graph uses {node.domain}.{node.op_type}, which is no standard ONNX operator")
        assert not any(attribute.HasField("g") for attribute in node.attribute), "subgraphs are not renamed"
        _strip(node)
        graph.node.append(node)
    for value in proto.graph.input:
        graph.input.append(_strip(value))
    for value in proto.graph.output:
        graph.output.append(_strip(value))
    graph.initializer.extend(_strip(tensor) for tensor in proto.graph.initializer if tensor.name not in weights)
    return StageGraph(graph, weights, opset)


def _strip(part: Any) -> Any:
    part.doc_string = ""
    del part.metadata_props[:]
    if isinstance(part, onnx.NodeProto):
        part.name = ""
    return part


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=DTYPES[kind.elem_type], shape=shape)
