"""Half precision: a float32 graph as a strongly typed float16 or bfloat16 graph, with islands of float32.

An island is the path of a torch module, as node names hold it. It means the nodes of that module itself, not those of the
modules inside it: a residual sum that overflows does not pull the convolutions around it into float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ArtifactError, missing_extra
from .onnx import StageGraph
from .weights import WeightRef, WeightStore, attach

try:
    import ml_dtypes
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise missing_extra(error.name or "onnx", "export") from None

TYPES: dict[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
NAMES: dict[int, str] = {TensorProto.FLOAT: "fp32", **{half: name for name, half in TYPES.items()}}
LARGEST: dict[int, float] = {
    half: float(ml_dtypes.finfo(helper.tensor_dtype_to_np_dtype(half)).max) for half in TYPES.values()
}
UNBOUNDED = 1e9  # a constant beyond it is no number but "minus infinity": a mask, or the bound of a Clip
ANY_TYPE = ("Cast", "Shape", "Size", "IsNaN", "IsInf")  # read a value as it is: a Cast before them would only lose bits
UNINFERRED = (
    "GroupNormalization",
)  # onnx (1.23) does not infer its output: it has the type and shape of the first input
TYPED_BY_ATTRIBUTE = ("Cast", "Constant", "ConstantOfShape")
MOVES = (
    "Reshape",
    "Transpose",
    "Slice",
    "Concat",
    "Gather",
    "Unsqueeze",
    "Squeeze",
    "Expand",
    "Identity",
    "Split",
    "Pad",
    "Flatten",
)


def lower(stage: StageGraph, store: WeightStore, precision: str, islands: Collection[str]) -> StageGraph:
    """A float32 stage as a strongly typed graph of `precision` ("fp16", "bf16"), with `islands` in float32.

    Graph inputs and outputs keep their types. Values that change type do so in one Cast, which all readers share. An
    operator that does not take the half type at this opset stays in float32. A large weight that both types read exists
    once. Constants that stand for minus infinity become the lowest finite half number. Raises ArtifactError.
    """
    return _Lowering(stage, store, half_type(precision), frozenset(islands), keep_weights=False).run()


def trial(stage: StageGraph, store: WeightStore, precision: str, islands: Collection[str]) -> StageGraph:
    """emulate(lower(...)), bit for bit, but without the lowered weights in the store: they are rounded at load."""
    lowered = _Lowering(stage, store, half_type(precision), frozenset(islands), keep_weights=True).run()
    return emulate(lowered)


def emulate(stage: StageGraph) -> StageGraph:
    """A lowered stage as a float32 graph: every half value is computed in float32, then rounded by two Casts.

    This is a machine with half storage and float32 accumulation, on any runtime: onnxruntime's CPU provider computes
    chains of float16 nodes in float32 without rounding, which hides overflow, and has no bfloat16. The weights stay
    stored as they are.
    """
    types = {name: tensor.elem_type for name, tensor in inferred_values(stage).items()}
    graph = onnx.GraphProto(name=stage.graph.name, input=stage.graph.input, output=stage.graph.output)
    for tensor in stage.graph.initializer:
        graph.initializer.append(_as_type(tensor, TensorProto.FLOAT) if tensor.data_type in LARGEST else tensor)
    for node in stage.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        halves = [i for i, value in enumerate(node.output) if types.get(value) in LARGEST]
        if halves:
            _retype(copy, TensorProto.FLOAT)
        for i in halves if node.op_type not in MOVES else ():
            value = node.output[i]
            wide, narrow = f"{value}:wide", f"{value}:narrow"
            copy.output[i] = wide
            graph.node.append(helper.make_node("Cast", [wide], [narrow], node.name, to=types[value]))
            graph.node.append(helper.make_node("Cast", [narrow], [value], node.name, to=TensorProto.FLOAT))
    weights = {name: replace(ref, seen=TensorProto.FLOAT) for name, ref in stage.weights.items()}
    return replace(stage, graph=graph, weights=weights)


class _Lowering:
    """Builds the lowered graph node by node; knows each value's type and under which names it exists."""

    def __init__(
        self, stage: StageGraph, store: WeightStore, half: int, islands: frozenset[str], *, keep_weights: bool
    ) -> None:
        """keep_weights: large weights that are not stored in half precision stay in float32, behind a Cast."""
        self.stage, self.store, self.half, self.keep_weights = stage, store, half, keep_weights
        self.tensors = inferred_values(stage)
        self.types = {name: tensor.elem_type for name, tensor in self.tensors.items()}  # of lowered values, afterwards
        self.graph = onnx.GraphProto(name=stage.graph.name, input=stage.graph.input, output=stage.graph.output)
        self.weights: dict[str, WeightRef] = {}
        self.names: dict[tuple[str, int], str] = {}
        self.outputs = {value.name for value in stage.graph.output}
        self.islands = islands & {node.name for node in float_nodes(stage, self.types)}

    def run(self) -> StageGraph:
        plan = [(node, *self._signature(node)) for node in self.stage.graph.node]
        if not any(self.half in (*takes, *gives) for _, takes, gives in plan):
            return replace(self.stage, islands=self.islands)
        wanted: dict[str, set[int]] = defaultdict(set)
        for node, takes, _ in plan:
            for value, kind in zip(node.input, takes, strict=True):
                wanted[value].add(kind)
        self._constants(wanted)
        for node, takes, gives in plan:
            inputs = [self._read(value, kind, node.name) for value, kind in zip(node.input, takes, strict=True)]
            copy = self.graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = inputs
            if self.half in gives:
                _retype(copy, self.half)
            for i, kind in enumerate(gives):
                self._give(copy, i, kind)
            if node.op_type in UNINFERRED:
                shape = [dim.dim_param or dim.dim_value for dim in self.tensors[node.output[0]].shape.dim]
                self.graph.value_info.append(helper.make_tensor_value_info(copy.output[0], gives[0], shape))
        return StageGraph(self.graph, self.weights, self.stage.opset, self.islands)

    def _signature(self, node: onnx.NodeProto) -> tuple[list[int], list[int]]:
        """The types of a node's inputs and outputs in the lowered graph; 0 for an input that is read as it is."""
        schema = onnx.defs.get_schema(node.op_type, self.stage.opset, node.domain)
        name = f"tensor({'float16' if self.half == TensorProto.FLOAT16 else 'bfloat16'})"
        lowers = {rule.type_param_str for rule in schema.type_constraints if name in rule.allowed_type_strs}
        if node.name in self.islands:
            lowers.clear()
        typed = {formal.type_str for formal in schema.inputs}
        if node.op_type in TYPED_BY_ATTRIBUTE and not any(a.name.startswith("value_") for a in node.attribute):
            typed.add(schema.outputs[0].type_str)

        def kinds(values: Sequence[str], formals: Sequence[Any], lowers: set[str]) -> list[int]:
            types = [self.types.get(value, 0) for value in values]
            letters = [formals[min(i, len(formals) - 1)].type_str for i in range(len(values))]
            pairs = zip(types, letters, strict=True)
            return [self.half if t == TensorProto.FLOAT and letter in lowers else t for t, letter in pairs]

        takes = kinds(node.input, schema.inputs, lowers)
        if node.op_type in ANY_TYPE:
            takes = [0] * len(takes)
        return takes, kinds(node.output, schema.outputs, lowers & typed)

    def _constants(self, wanted: Mapping[str, set[int]]) -> None:
        """Weights and small constants in the types that the nodes read."""
        for tensor in self.stage.graph.initializer:
            kinds = wanted.get(tensor.name, set())
            if self.half not in kinds or tensor.data_type != TensorProto.FLOAT:
                self.graph.initializer.append(tensor)
                continue
            lowered = self.graph.initializer.add()
            lowered.CopyFrom(_as_type(tensor, self.half))
            if TensorProto.FLOAT in kinds or tensor.name in self.outputs:
                self.graph.initializer.append(tensor)
                lowered.name = self.names[tensor.name, self.half] = f"{tensor.name}:{NAMES[self.half]}"
            else:
                self.types[tensor.name] = self.half
        for name, ref in self.stage.weights.items():
            self.weights[name] = self._weight(name, ref, wanted.get(name, ()))

    def _weight(self, name: str, ref: WeightRef, kinds: Collection[int]) -> WeightRef:
        """A weight of both types stays as it is stored: in the half type only if that loses nothing for the islands."""
        if self.half not in kinds:
            return ref
        values = self.store.read(ref)
        bounded = _bounded(values, self.half)
        if not np.array_equal(values, bounded, equal_nan=True):
            ref = self.store.add(bounded)
        if ref.stored != self.half and (self.keep_weights or TensorProto.FLOAT in kinds):
            return ref
        self.types[name] = self.half
        return self.store.lower(ref, self.half)

    def _read(self, value: str, kind: int, module: str) -> str:
        """The name under which `value` has the type `kind`; adds the Cast if it has not been made yet."""
        have = self.types.get(value, 0)
        if not value or kind in (0, have):
            return self.names.get((value, have), value)
        if (value, kind) not in self.names:
            name = self.names[value, kind] = f"{value}:{NAMES[kind]}"
            source = self.names.get((value, have), value)
            self.graph.node.append(helper.make_node("Cast", [source], [name], module, to=kind))
        return self.names[value, kind]

    def _give(self, node: onnx.NodeProto, index: int, kind: int) -> None:
        """Notes the type of an output; an output of the graph is cast back to its own type."""
        value = node.output[index]
        have = self.types.get(value, 0)
        if kind == have:
            return
        self.types[value] = kind
        if value in self.outputs:
            node.output[index] = self.names[value, kind] = f"{value}:{NAMES[kind]}"
            self.names[value, have] = value
            self.graph.node.append(helper.make_node("Cast", [node.output[index]], [value], node.name, to=have))


def half_type(precision: str) -> int:
    """The ONNX type of "fp16" or "bf16". Raises ArtifactError."""
    if precision not in TYPES:
        raise ArtifactError(f"precision must be one of {', '.join(TYPES)}, got {precision!r}")
    return TYPES[precision]


def inferred_values(stage: StageGraph) -> dict[str, onnx.TypeProto.Tensor]:
    """Type and shape of every input, output, constant and value between."""
    graph = onnx.GraphProto()
    graph.CopyFrom(stage.graph)
    graph.name = graph.name or "stage"
    for node in graph.node:
        if node.op_type in UNINFERRED:
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output))
    attach(graph, stage.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", stage.opset)])
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {each.name: each.type.tensor_type for each in (*graph.input, *graph.value_info, *graph.output)}
    constants = {each.name: helper.make_tensor_type_proto(each.data_type, each.dims) for each in graph.initializer}
    return values | {name: kind.tensor_type for name, kind in constants.items()}


def float_nodes(stage: StageGraph, types: Mapping[str, int]) -> list[onnx.NodeProto]:
    """The nodes that read or give float32: those that an island can hold."""
    is_float = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
    return [node for node in stage.graph.node if not is_float.isdisjoint((*node.input, *node.output))]


def _retype(node: onnx.NodeProto, kind: int) -> None:
    """Makes a node whose output type is an attribute of its own give `kind`."""
    if node.op_type not in TYPED_BY_ATTRIBUTE:
        return
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = helper.make_tensor("", kind, [1], [0.0])
        node.attribute.append(helper.make_attribute("value", zero))
    for attribute in node.attribute:
        if attribute.name == "to":
            attribute.i = kind
        elif attribute.name == "value":
            attribute.t.CopyFrom(_as_type(attribute.t, kind))


def _as_type(tensor: onnx.TensorProto, kind: int) -> onnx.TensorProto:
    """A small float tensor in another float type; what is unbounded becomes the largest finite number of a half type."""
    values = numpy_helper.to_array(tensor).astype(np.float32)
    if kind in LARGEST:
        values = _bounded(values, kind)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    with np.errstate(over="ignore"):
        return helper.make_tensor(tensor.name, kind, tensor.dims, values.astype(dtype).tobytes(), raw=True)


def _bounded(values: NDArray[np.float32], half: int) -> NDArray[np.float32]:
    clipped = np.clip(values, -LARGEST[half], LARGEST[half])
    return np.where(np.abs(values) >= UNBOUNDED, clipped, values)
