"""One stage as an ONNX graph: torch.onnx (dynamo), stripped of everything that is not arithmetic."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ArtifactError, missing_extra
from ..folders.manifests import GraphSpec, Size, TensorSpec
from ..pipelines.stages import CONDITION, FINITE, IMAGES, LATENTS, Stages, quiet
from .options import MAX_BATCH
from .sides import FreeSides
from .weights import INLINE_BYTES, WeightRef, WeightStore, attach

try:
    import onnx
    import onnx_ir as ir
    import onnxscript  # noqa: F401  (torch.onnx needs it)
    import torch
    from onnx import TensorProto, helper
except ImportError as error:
    raise missing_extra(error.name or "onnx", "export") from None

OPSET = 23  # the first with native Attention and GroupNormalization
BATCH = "batch"
IR_VERSION = 10
EXAMPLE_BATCH = 2  # torch.export specialises sizes 0 and 1
DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
}
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
COUNTED = (
    "Attention",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "Softmax",
)
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx says which module a node comes from


@dataclass(frozen=True)
class StageGraph:
    """A graph without its large weights, which lie in the store under the names the nodes use."""

    graph: onnx.GraphProto  # node names say which module of the network a node comes from
    weights: dict[str, WeightRef]
    opset: int
    islands: frozenset[str] = frozenset()  # modules kept in float32 in a graph of lower precision


def export_text_encoder(stages: Stages, store: WeightStore, *, opset: int = OPSET) -> StageGraph:
    """The text encoder(s): token ids and masks -> the conditions of the denoiser."""
    outputs = dict.fromkeys(stages.conditions, ())
    return _export(stages.text_encoder, stages.example_tokens(EXAMPLE_BATCH), outputs, store, opset)


def export_denoiser(
    stages: Stages, store: WeightStore, size: Size, *, opset: int = OPSET, sides: FreeSides | None = None
) -> StageGraph:
    """The denoiser at one image size, or with its sides free: latents, timestep, conditions, and what it takes beside them -> m."""
    latents = torch.zeros(EXAMPLE_BATCH, *stages.latent_shape(size))
    with torch.inference_mode():
        conditions = [c.clone() for c in stages.text_encoder(*stages.example_tokens(EXAMPLE_BATCH).values())]
        told = stages.beside(torch.zeros(EXAMPLE_BATCH, *size, 3, dtype=torch.uint8), guidance=8.0)
    inputs = {LATENTS: latents, "timestep": torch.full((EXAMPLE_BATCH,), 999.0)}
    inputs |= dict(zip(stages.conditions, conditions, strict=True)) | {name: v.clone() for name, v in told.items()}
    return _export(stages.denoiser(None if sides else size), inputs, {"m": latents.shape}, store, opset, sides)


def export_decoder(
    stages: Stages, store: WeightStore, size: Size, *, opset: int = OPSET, sides: FreeSides | None = None
) -> StageGraph:
    """The decoder at one image size, or with its sides free: latents -> images, finite."""
    latents = torch.zeros(EXAMPLE_BATCH, *stages.latent_shape(size))
    outputs = {IMAGES: (EXAMPLE_BATCH, *size, 3), FINITE: (EXAMPLE_BATCH,)}
    return _export(stages.decoder, {LATENTS: latents}, outputs, store, opset, sides)


def export_image_encoder(
    stages: Stages, store: WeightStore, size: Size, *, opset: int = OPSET, sides: FreeSides | None = None
) -> StageGraph:
    """The image encoder at one image size, or with its sides free: images -> latents."""
    images = torch.zeros(EXAMPLE_BATCH, *size, 3, dtype=torch.uint8)
    outputs = {LATENTS: (EXAMPLE_BATCH, *stages.latent_shape(size))}
    return _export(stages.image_encoder, {IMAGES: images}, outputs, store, opset, sides)


def export_condition_encoder(
    stages: Stages, store: WeightStore, size: Size, *, opset: int = OPSET, sides: FreeSides | None = None
) -> StageGraph:
    """What reads a conditioning picture at one image size, or with its sides free: condition -> features."""
    assert stages.condition_encoder is not None
    condition = torch.zeros(EXAMPLE_BATCH, *size, 3, dtype=torch.uint8)
    with torch.inference_mode():
        outputs = dict(zip(stages.features, (one.shape for one in stages.condition_encoder(condition)), strict=True))
    return _export(stages.condition_encoder, {CONDITION: condition}, outputs, store, opset, sides)


def save_graph(stage: StageGraph, path: Path) -> GraphSpec:
    """Writes one ONNX file that refers to the weights file beside it; returns what the manifest says about it."""
    graph = onnx.GraphProto()
    graph.CopyFrom(stage.graph)
    graph.name = path.stem
    attach(graph, stage.weights)
    _name_nodes(graph)
    opsets = [helper.make_opsetid("", stage.opset)]
    model = helper.make_model(graph, producer_name="imagine-flash", opset_imports=opsets, ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    inputs, outputs = ([_tensor_spec(value) for value in values] for values in (graph.input, graph.output))
    found = Counter(node.op_type for node in graph.node)
    nodes = {kind: found[kind] for kind in COUNTED if found[kind]}
    return GraphSpec(
        file=path.name, inputs=inputs, outputs=outputs, opset=stage.opset, nodes=nodes, islands=sorted(stage.islands)
    )


def _name_nodes(graph: onnx.GraphProto) -> None:
    """unet.conv_in/Conv, and unet.conv_in/Conv_2 for the second: runtimes ask for unique names, profilers show them."""
    seen: Counter[str] = Counter()
    for node in graph.node:
        name = f"{node.name}/{node.op_type}" if node.name else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _export(
    module: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: Mapping[str, Sequence[int]],
    store: WeightStore,
    opset: int,
    sides: FreeSides | None = None,
) -> StageGraph:
    """The first axis of every input and output is free ("batch"), and with `sides` those of its picture. outputs: their shapes for
    these inputs, where there are sides. Raises ArtifactError if torch fixed one."""
    batch = torch.export.Dim(BATCH, min=1, max=MAX_BATCH)
    free = [{0: batch, **(sides.dims(name, v.shape) if sides else {})} for name, v in inputs.items()]
    is_free = (
        sides is not None
    )  # then diffusers' question, whether there are more than 2^31 elements, has no one answer
    with quiet(), torch.inference_mode():
        # not left to torch.onnx, whose own settings of torch.export lose that PixArt's inputs share their batch
        exported = torch.export.export(
            module.eval(),
            tuple(inputs.values()),
            dynamic_shapes=_by_parameter(module, free),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=is_free,
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
            optimize=False,
        )
        assert program is not None
        parameters = [*program.model.graph.initializers.values()]
        program.optimize()
    stage = _take_weights(program.model, store, opset)
    for parameter in parameters:  # the optimizer's rules keep the last graph they saw, weights that it folded included
        parameter.const_value = None
    shapes = {**outputs, **{name: values.shape for name, values in inputs.items()}}
    for value in (*stage.graph.input, *stage.graph.output):
        _name_axes(value, {0: BATCH, **(sides.names(value.name, shapes[value.name]) if sides else {})})
    return stage


def _name_axes(value: onnx.ValueInfoProto, names: Mapping[int, str]) -> None:
    """Gives free axes these names. Raises ArtifactError for one that torch fixed."""
    dims = value.type.tensor_type.shape.dim
    for axis, name in names.items():
        if not dims[axis].dim_param:
            raise ArtifactError(f"torch fixed the {name} of {value.name!r} at {dims[axis].dim_value}; it must be free")
        dims[axis].dim_param = name


def _by_parameter(module: torch.nn.Module, free: Sequence[dict[int, Any]]) -> tuple[Any, ...]:
    """The free axes of each input, those of a forward's *more in a tuple, as torch.export wants them."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind != parameter.VAR_POSITIONAL for parameter in parameters)
    return (*free[:named], *([tuple(free[named:])] if free[named:] else []))


def _take_weights(model: ir.Model, store: WeightStore, opset: int) -> StageGraph:
    """Moves large float initializers to the store, then strips names of files, stack traces and inferred shapes."""
    weights, dropped = _store_large(model, store)
    idle = {node.outputs[0].name for node in model.graph if _is_idle_squeeze(node)}
    masked = {node.outputs[0].name: rows for node in model.graph if (rows := _rows_of_mask(node)) > 1}
    proto = ir.to_proto(model)
    if proto.functions:
        raise ArtifactError(f"torch left the function {proto.functions[0].name!r} in the graph; it must be plain ONNX")
    graph = onnx.GraphProto(name=proto.graph.name)
    for node in proto.graph.node:
        if node.output[0] in dropped:
            continue
        if node.domain not in ("", "ai.onnx"):
            raise ArtifactError(f"the graph uses {node.domain}.{node.op_type}, which is no standard ONNX operator")
        assert not any(attribute.HasField("g") for attribute in node.attribute), "subgraphs are not renamed"
        scope = _module_of(node)
        if node.output[0] in idle:
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output))
        if node.output[0] in masked:
            _expand_mask(graph, node, masked[node.output[0]], scope)
        _strip(node).name = scope
        graph.node.append(node)
    graph.input.extend(map(_strip, proto.graph.input))
    graph.output.extend(map(_strip, proto.graph.output))
    graph.initializer.extend(_strip(tensor) for tensor in proto.graph.initializer if tensor.name not in dropped)
    return StageGraph(graph, weights, opset)


def _store_large(model: ir.Model, store: WeightStore) -> tuple[dict[str, WeightRef], set[str | None]]:
    """The large float initializers as weights of the store, by the names that nodes read; and the values that nobody gives any
    more: these initializers, what the Casts of half weights gave, and the Transposes behind them."""
    weights: dict[str, WeightRef] = {}
    dropped: set[str | None] = set()
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None, name
        if tensor.dtype not in FLOATS or tensor.nbytes <= INLINE_BYTES:
            continue
        half = tensor.dtype != ir.DataType.FLOAT
        seen = _widened(value) if half else {value.name: None}
        dropped.update((name, *seen, *((cast.outputs[0].name for cast, _ in value.uses()) if half else ())))
        for seen_name, axes in seen.items():
            values = tensor.numpy()
            values = values if axes is None else np.ascontiguousarray(values.transpose(axes))
            weights[str(seen_name)] = store.add(values)
        value.const_value = ir.Tensor(np.zeros(0, np.float32), name=name)  # a place holder
    return weights, dropped


def _expand_mask(graph: onnx.GraphProto, attention: onnx.NodeProto, rows: int, scope: str) -> None:
    """Gives an Attention a mask of one row for each query."""
    shape, mask = f"{attention.output[0]}:mask_shape", f"{attention.output[0]}:mask"
    graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [4], [1, 1, rows, 1]))
    graph.node.append(helper.make_node("Expand", [attention.input[3], shape], [mask], scope))
    attention.input[3] = mask


def _widened(weight: ir.Value) -> dict[str | None, tuple[int, ...] | None]:
    """The float32 values that a weight in half precision becomes, with the axes where it is transposed as well. The Casts
    and Transposes go: the weight is stored as its readers see it. Raises ArtifactError for another reader."""
    seen: dict[str | None, tuple[int, ...] | None] = {}
    for cast, _ in weight.uses():
        if cast.op_type != "Cast" or cast.attributes["to"].as_int() != ir.DataType.FLOAT:
            raise ArtifactError(
                f"torch reads the half weight {weight.name!r} in {cast.op_type}; it must be widened first"
            )
        for reader, _ in cast.outputs[0].uses():
            if reader.op_type == "Transpose":
                seen[reader.outputs[0].name] = tuple(reader.attributes["perm"].as_ints())
            else:
                seen[cast.outputs[0].name] = None
    return seen


def _strip(part: Any) -> Any:
    part.doc_string = ""
    del part.metadata_props[:]
    return part


def _is_idle_squeeze(node: ir.Node) -> bool:
    """torch.squeeze leaves an axis that is longer than 1; the Squeeze that torch.onnx (2.13) makes of it does not load."""
    if node.op_type != "Squeeze" or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return False
    shape, axes = node.inputs[0].shape, node.inputs[1].const_value
    if shape is None or axes is None:
        return False
    return any(isinstance(size := shape[int(axis)], int) and size != 1 for axis in axes.numpy().reshape(-1))


def _rows_of_mask(node: ir.Node) -> int:
    """The queries of an Attention whose mask has one row for all of them, which onnxruntime (1.31) refuses; else 0."""
    if node.op_type != "Attention" or len(node.inputs) < 4 or node.inputs[3] is None or node.inputs[0] is None:
        return 0
    queries, mask = node.inputs[0].shape, node.inputs[3].shape
    if queries is None or mask is None or len(mask) != 4 or mask[-2] != 1:
        return 0
    return rows if isinstance(rows := queries[-2], int) else 0


def _module_of(node: onnx.NodeProto) -> str:
    """The path of the torch module that a node comes from, such as unet.conv_in; "" at the top."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    path = [scope for scope in ast.literal_eval(scopes) if scope][:-1]  # the last is the value's own name
    return path[-1] if path else ""


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=DTYPES[kind.elem_type], shape=shape)
