"""Which graphs TensorRT's ONNX parser takes: the table of its operators, and what is said of a graph beyond it."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from imagine_flash.core.errors import ArtifactError
from imagine_flash.export.tensorrt_operators import OPERATORS, check_graph
from imagine_flash.tests.tensorrt_artifact import LATENTS, NODE, model

ROOT = Path(__file__).parents[2]
EMBEDDED = sorted((ROOT / "assets" / "emoji" / "artifact").glob("*.onnx"))


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: path.stem)
def test_the_embedded_graphs_pass(path):
    check_graph(path.stem, onnx.load(path, load_external_data=False))


def test_the_table_holds_what_torch_exports():
    assert EMBEDDED and len(OPERATORS) == 158
    for operator in ("Attention", "Conv", "GroupNormalization", "LayerNormalization", "MatMul", "Softmax"):
        assert OPERATORS[operator] >= {"FP32", "FP16", "BF16"}
    assert "Swish" not in OPERATORS and "BitShift" not in OPERATORS
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert OPERATORS.keys() - known == {"ParametricSoftplus", "ScaledTanh", "ImageScaler"}, "removed from ONNX long ago"


def attention(q=LATENTS, outputs=("y",), **attributes):
    return model([NODE("Attention", ["x", "x", "x"], outputs, **attributes)], shape=q)


BAD_GRAPHS = [
    (model([NODE("Det", ["x"], ["a"]), NODE("Det", ["x"], ["y"])]), r"Det \(2 of them\)"),
    (model([NODE("Gelu", ["x"], ["y"], domain="com.microsoft")]), r"com\.microsoft\.Gelu \(1 of them\)"),
    (model([NODE("Mul", ["x", "x"], ["y"])], kind=TensorProto.DOUBLE), r"Mul of DOUBLE \(1 of them\)"),
    (model([NODE("Transpose", ["x"], ["y"])], kind=TensorProto.UINT8), r"Transpose of UINT8 \(1 of them\)"),
    (model([NODE("Cast", ["x"], ["y"], to=TensorProto.UINT16)], out=TensorProto.UINT16), "Cast of UINT16"),
    (model([NODE("Relu", ["x"], ["y"])], opset=8), "opset 8, but"),
    (model([NODE("Relu", ["x"], ["y"])], opset=25), "opset 25, but TensorRT's ONNX parser takes 9 to 24"),
    (attention(("batch", 8, 16), q_num_heads=2, kv_num_heads=2), "Attention of other than 4 axes"),
    (attention(softcap=30.0), "Attention with a cache, softcap"),
    (attention(outputs=("y", "k", "v")), "Attention with a cache, softcap or a second output"),
]


@pytest.mark.parametrize(("graph", "message"), BAD_GRAPHS)
def test_what_the_parser_does_not_list_is_named(graph, message):
    with pytest.raises(ArtifactError, match=f"^denoiser: .*{message}") as error:
        check_graph("denoiser", graph)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "graph",
    [
        attention(),
        model([NODE("Mul", ["x", "x"], ["y"])], kind=TensorProto.BFLOAT16, out=TensorProto.BFLOAT16),
        model([NODE("Cast", ["x"], ["y"], to=TensorProto.UINT8)], out=TensorProto.UINT8),
        model([NODE("IsNaN", ["x"], ["n"]), NODE("Where", ["n", "x", "x"], ["y"])]),
    ],
    ids=["4-axis attention", "bfloat16", "uint8 pictures", "a bool condition"],
)
def test_what_the_parser_lists_passes(graph):
    check_graph("denoiser", graph)
