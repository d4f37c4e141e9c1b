"""Which graphs TensorRT's ONNX parser takes: the table of its operators, and what is said of a graph beyond it."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph

from imagine_flash.core.errors import ArtifactError
from imagine_flash.export.tensorrt_operators import OPERATORS, allow_decomposing, check_graph, types_and_ranks
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


def exported(folder: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in sorted(folder.glob("*.onnx"))}


def test_the_types_of_a_real_export_are_known(tiny_artifact):
    """ONNX infers nothing of GroupNormalization; all that came after the first one of a network was taken unread."""
    for name, graph in exported(tiny_artifact).items():
        types, ranks = types_and_ranks(graph)
        read = [value for node in graph.graph.node for value in node.input if value]
        assert sum(value in types for value in read) >= 0.99 * len(read), name
        assert sum(value in ranks for value in read) >= 0.99 * len(read), name
        check_graph(name, graph)


@pytest.mark.parametrize("name", ["denoiser", "decoder", "sampler_3"])
def test_a_wrong_type_deep_in_a_network_is_found(tiny_artifact, name):
    graph = exported(tiny_artifact)[name]
    deepest = [node for node in graph.graph.node if node.op_type == "Sigmoid"][-1]
    cast = NODE("Cast", deepest.input[:1], ["wide"], to=TensorProto.DOUBLE)
    narrow = NODE("Cast", ["wider"], deepest.output[:1], to=TensorProto.FLOAT)
    place = list(graph.graph.node).index(deepest)
    deepest.CopyFrom(NODE("Sigmoid", ["wide"], ["wider"]))
    graph.graph.node.insert(place + 1, narrow)
    graph.graph.node.insert(place, cast)
    with pytest.raises(
        ArtifactError, match=r"does not list Cast of DOUBLE \(2 of them\), Sigmoid of DOUBLE \(1 of them\);"
    ):
        check_graph(name, graph)


def test_every_attention_may_be_decomposed(tiny_artifact):
    graphs = exported(tiny_artifact)
    for name in ("text_encoder", "denoiser", "decoder", "image_encoder", "sampler_1"):
        before = onnx.ModelProto()
        before.CopyFrom(graphs[name])
        assert allow_decomposing(graphs[name])
        for old, new in zip(before.graph.node, graphs[name].graph.node, strict=True):
            added = [attribute for attribute in new.attribute if attribute not in old.attribute]
            wanted = [("TRT_decomposable", 1)] if new.op_type == "Attention" else []
            assert [(attribute.name, attribute.i) for attribute in added] == wanted
    assert not allow_decomposing(model([NODE("Relu", ["x"], ["y"])]))


def test_others_refuse_the_attribute_so_it_needs_a_copy():
    graph = attention()
    graph.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, LATENTS))
    onnx.checker.check_model(graph, full_check=True)
    onnxruntime.InferenceSession(graph.SerializeToString())
    allow_decomposing(graph)
    with pytest.raises(onnx.checker.ValidationError, match="Unrecognized attribute: TRT_decomposable"):
        onnx.checker.check_model(graph)
    with pytest.raises(InvalidGraph, match="TRT_decomposable"):
        onnxruntime.InferenceSession(graph.SerializeToString())
