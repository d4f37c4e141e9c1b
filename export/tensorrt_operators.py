"""What TensorRT's ONNX parser lists as supported, as plain facts, and whether a graph keeps to it.

From docs/operators.md of github.com/onnx/onnx-tensorrt as of TensorRT 10.15, the newest list at hand. Attention is listed
since 10.14; RMSNormalization, RotaryEmbedding and TensorScatter since 10.15. Of what the list says of shapes and attributes
only Attention's is here, and what `docs/TRT_custom_ops.md` there says of decomposing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..core.errors import ArtifactError

if TYPE_CHECKING:
    import onnx

PARSER_VERSION = "10.15"
OPSETS = (9, 24)  # the oldest and the newest

_BY_TYPES: dict[str, str] = {  # types -> operators
    "FP32 FP16 BF16": """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos
        Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
        GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM
        LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool
        MeanVarianceNormalization PRelu ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal
        RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh Scan
        Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample
    """,
    "FP32 FP16 BF16 INT32 INT64": """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod
        Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
        ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub
        Sum TopK
    """,
    "FP32 FP16 BF16 INT32 INT64 BOOL": """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape
        ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
    "FP32 FP16": """
        BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign
    """,
    "BOOL": "And Not Or Xor",
    "FP32 FP16 BF16 INT32 INT64 UINT8 BOOL": "Cast CastLike",
    "FP32 FP16 BF16 FP8 FP4 INT4 INT32 INT64 BOOL": "Constant ConstantOfShape",
    "FP32 FP16 BF16 INT8 FP8": "Attention",
    "INT8 FP8 FP4 INT4": "DequantizeLinear",
    "FP32 FP16 BF16 INT8 INT32 INT64": "Gelu",
    "FP32 FP16 BF16 FP8 INT32 INT64": "Mean",
    "FP32": "STFT",
    "FP32 FP16 BF16 INT32": "TensorScatter",
}
OPERATORS: dict[str, frozenset[str]] = {
    operator: frozenset(types.split()) for types, operators in _BY_TYPES.items() for operator in operators.split()
}
TYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    9: "BOOL",
    10: "FP16",
    11: "DOUBLE",
    16: "BF16",
    17: "FP8",
    22: "INT4",
    23: "FP4",
}  # by onnx.TensorProto.DataType
AS_THEIR_INPUT = ("GroupNormalization", "MeanVarianceNormalization")  # ONNX (1.23) infers no type or shape of theirs
DECOMPOSABLE = "TRT_decomposable"  # the parser's own attribute of Attention, 0 where it is not given
TYPED_BY_OUTPUT = ("Cast", "CastLike", "Constant", "ConstantOfShape")


def check_graph(name: str, model: onnx.ModelProto) -> None:
    """Raises ArtifactError, naming each operator and how often, for what TensorRT's ONNX parser does not list.

    Checked are the opset, the operators, the type of the data they read (of a cast or constant also what it gives), and
    the form of Attention. Types are ONNX's shape inference's; one that it does not find is not checked. Weights need not be
    loaded.
    """
    import onnx

    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ArtifactError(
            f"{name}: opset {opset}, but TensorRT's ONNX parser takes {OPSETS[0]} to {OPSETS[1]}; export with another opset"
        )
    numbers, ranks = types_and_ranks(model)
    types = {key: TYPES.get(n) or onnx.TensorProto.DataType.Name(n) for key, n in numbers.items()}
    wrong = Counter(complaint for node in model.graph.node for complaint in _complaints(node, types, ranks))
    if wrong:
        listed = ", ".join(f"{complaint} ({count} of them)" for complaint, count in sorted(wrong.items()))
        raise ArtifactError(
            f"{name}: TensorRT's ONNX parser {PARSER_VERSION} does not list {listed}; "
            "export with another opset or without the format 'tensorrt'"
        )


def types_and_ranks(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, int]]:
    """By value, its type (of onnx.TensorProto.DataType) and its number of axes, as far as they follow from the graph."""
    import onnx

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type in AS_THEIR_INPUT:  # inference stops there, and knows nothing of what follows
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output[:1]))
    graph = onnx.shape_inference.infer_shapes(plain).graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types = {name: value.elem_type for name, value in values.items() if value.elem_type}
    ranks = {name: len(value.shape.dim) for name, value in values.items() if value.HasField("shape")}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return types, ranks | {tensor.name: len(tensor.dims) for tensor in graph.initializer}


def allow_decomposing(model: onnx.ModelProto) -> bool:
    """Lets TensorRT compute each Attention with several kernels where it has no fused one; whether there is any.

    Otherwise the build fails there: in float32, and for heads wider than 256 such as those of Stable Diffusion's decoder. The
    attribute is none of ONNX, so onnxruntime and ONNX's checker refuse a graph that has it.
    """
    import onnx

    nodes = [node for node in model.graph.node if node.op_type == "Attention"]
    for node in nodes:
        node.attribute.append(onnx.helper.make_attribute(DECOMPOSABLE, 1))
    return bool(nodes)


def _complaints(node: onnx.NodeProto, types: dict[str, str], ranks: dict[str, int]) -> Iterator[str]:
    """What the parser does not take of a node: its operator, or else each of its types, or its form."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        yield f"{node.domain}.{node.op_type}".lstrip(".")
        return
    data = node.input[1:2] if node.op_type == "Where" else node.input[:1]  # the rest are indices, shapes or of its type
    made = node.output[:1] if node.op_type in TYPED_BY_OUTPUT else []
    for kind in {types[value] for value in (*data, *made) if value in types} - OPERATORS[node.op_type]:
        yield f"{node.op_type} of {kind}"
    if node.op_type == "Attention":
        if any(ranks.get(value, 4) != 4 for value in node.input[:4]):
            yield "Attention of other than 4 axes"
        if any((*node.input[4:], *node.output[1:])) or any(a.name == "softcap" and a.f for a in node.attribute):
            yield "Attention with a cache, softcap or a second output"
