"""What OpenVINO is spared: the same function as a graph that its CPU plugin computes in less time.

What is done to weights is left as operations on constants, which OpenVINO computes when it compiles and finds done in its cache.
Weights that are inputs of the graph, as those that LoRAs change, and weights in 8 bits are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

LARGE = 2**19  # values of a weight; below that a second product may cost more than the copy, as in the embedded model
Rewrite = Callable[[Any, Any], bool]  # opset, node -> whether it was one of these, and is another now


def rewrite(model: Any) -> dict[str, int]:
    """Changes an OpenVINO model in place; how often each rewrite found its place."""
    ops = import_module("openvino.opset13")
    rewrites: dict[str, Rewrite] = {"gates": split_gate, "upsampling": fold_upsampling}
    found = {name: sum(change(ops, node) for node in model.get_ordered_ops()) for name, change in rewrites.items()}
    if any(found.values()):
        model.validate_nodes_and_infer_types()
    return found


def split_gate(ops: Any, node: Any) -> bool:
    """A product that is split in two at once, as GEGLU's is, becomes two: the split copied it, the halves go straight into what is
    computed of them."""
    if node.get_type_name() not in ("Split", "VariadicSplit") or node.get_output_size() != 2:
        return False
    product, bias = _source(node, 0), None
    if product.get_type_name() == "Add":
        terms = [_source(product, i) for i in (0, 1)]
        product, bias = sorted(terms, key=lambda each: each.get_type_name() != "MatMul")
    if product.get_type_name() != "MatMul" or product.get_attributes()["transpose_a"]:
        return False
    weight, rows = _constant(_source(product, 1)), product.get_attributes()["transpose_b"]
    if weight is None or len(weight.shape) != 2 or weight.shape[0] * weight.shape[1] < LARGE:
        return False
    if bias is not None and _constant(bias) is None:
        return False
    width, ends = weight.shape[0 if rows else 1], [node.output(i).get_partial_shape()[-1] for i in (0, 1)]
    if any(end.is_dynamic or 2 * end.get_length() != width for end in ends):
        return False
    if bias is not None and (not bias.shape or bias.shape[-1] != width):
        return False
    weights = _halves(ops, weight, 0 if rows else 1)
    biases = None if bias is None else _halves(ops, _constant(bias), len(bias.shape) - 1)
    for i in (0, 1):
        made = ops.matmul(product.input_value(0), weights[i], False, rows)
        _replace(node.output(i), made if biases is None else ops.add(made, biases[i]))
    return True


def fold_upsampling(ops: Any, node: Any) -> bool:
    """A 3x3 convolution of a picture that was enlarged twofold by repeating its pixels becomes a transposed one of the small
    picture, 4x4 and of stride 2, with 4 of 9 products: of taps w0, w1, w2 along an axis two read the same pixel, so that they are
    w0 and w1 + w2, or w0 + w1 and w2."""
    if node.get_type_name() != "Convolution" or _source(node, 0).get_type_name() != "Interpolate":
        return False
    resize, weight = _source(node, 0), _constant(_source(node, 1))
    if weight is None or list(weight.shape)[2:] != [3, 3] or not _doubles(resize) or not _is_plain(node):
        return False
    taps = _float32(ops, weight.output(0))
    for axis in (2, 3):
        w0, w1, w2 = ops.split(taps, axis, 3).outputs()
        taps = ops.concat([w2, ops.add(w1, w2), ops.add(w0, w1), w0], axis)
    how: dict[str, Any] = {"strides": [2, 2], "output_shape": None, "pads_begin": [1, 1], "pads_end": [1, 1]}
    of_input = ops.transpose(taps, [1, 0, 2, 3])
    _replace(node.output(0), ops.convolution_backprop_data(resize.input_value(0), of_input, **how, dilations=[1, 1]))
    return True


def _doubles(resize: Any) -> bool:
    """Whether it repeats each pixel twice along height and width, and nothing else."""
    how = resize.get_attributes()
    nearest = how["mode"] == "nearest" and how["coordinate_transformation_mode"] == "asymmetric"
    floors = how["nearest_mode"] in ("floor", "simple") and not any(how["pads_begin"]) and not any(how["pads_end"])
    before, after = resize.input_value(0).get_partial_shape(), resize.output(0).get_partial_shape()
    if not (nearest and floors) or before.is_dynamic or after.is_dynamic or len(before) != 4:
        return False
    (_, c, h, w), (_, c2, h2, w2) = before.to_shape(), after.to_shape()
    return (c2, h2, w2) == (c, 2 * h, 2 * w)


def _is_plain(convolution: Any) -> bool:
    """Stride 1, no dilation, one pixel of padding."""
    how = convolution.get_attributes()
    return all(set(how[name]) == {1} for name in ("strides", "dilations", "pads_begin", "pads_end"))


def _source(node: Any, i: int) -> Any:
    return node.input_value(i).get_node()


def _constant(node: Any) -> Any:
    """The constant of floating point that a node is, or converts to float32; None for anything else."""
    if node.get_type_name() == "Convert":
        node = _source(node, 0)
    kinds = ("f32", "f16", "bf16")
    return node if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in kinds else None


def _float32(ops: Any, value: Any) -> Any:
    return value if value.get_element_type().get_type_name() == "f32" else ops.convert(value, "f32").output(0)


def _halves(ops: Any, constant: Any, axis: int) -> list[Any]:
    """Split before they are converted, since OpenVINO may keep weights as they are stored."""
    return [_float32(ops, half) for half in ops.split(constant, axis, 2).outputs()]


def _replace(output: Any, made: Any) -> None:
    for reader in output.get_target_inputs():
        reader.replace_source_output(made.output(0))
