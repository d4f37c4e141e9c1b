"""Graphs that OpenVINO computes in less time are the same functions, and what only looks alike is left as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ov = pytest.importorskip("openvino", reason="its graphs are rewritten")
from openvino import opset13 as ops  # noqa: E402

from imagine_flash.engine.backends import openvino_rewrites  # noqa: E402
from imagine_flash.engine.backends.openvino_rewrites import rewrite  # noqa: E402

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def run(model: Any, *inputs: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What it gives in float32, and the kinds of nodes that are executed."""
    compiled = ov.Core().compile_model(model, "CPU", EXACT)
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()]
    return compiled(list(inputs))[0], kinds


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight(values: np.ndarray, stored: type) -> Any:
    """A constant, as an artifact stores it."""
    made = ops.constant(values.astype(stored))
    return made if stored is np.float32 else ops.convert(made, "f32")


def gated(
    *, transposed: bool = False, stored: type = np.float32, bias: bool = True, parts: int = 2, rows: int = 3
) -> Any:
    """x (rows, 6) -> a gelu(b), a and b the halves of a product."""
    x, w = ops.parameter([rows, 6], np.float32, "x"), random(6, 8 if parts == 2 else 12)
    product = ops.matmul(x, weight(np.ascontiguousarray(w.T) if transposed else w, stored), False, transposed)
    if bias:
        product = ops.add(product, weight(random(1, w.shape[1], seed=1), stored))
    halves = ops.split(product, 1, parts).outputs()
    return ov.Model([ops.multiply(halves[0], ops.gelu(halves[1], "erf"))], [x])


@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_is_two_products(stored: type, transposed: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_rewrites, "LARGE", 48)  # the weight's own size
    model, x = gated(transposed=transposed, stored=stored, bias=bias), random(3, 6, seed=2)
    expected, before = run(model, x)
    assert rewrite(model) == {"gates": 1, "upsampling": 0}
    found, after = run(model, x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "Split" in before and "Split" not in after


def test_what_is_split_otherwise_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rewrite(gated()) == {"gates": 0, "upsampling": 0}, "a small weight"
    monkeypatch.setattr(openvino_rewrites, "LARGE", 48)
    given = ops.parameter([6, 8], np.float32, "w")
    x = ops.parameter([3, 6], np.float32, "x")
    by_input = ov.Model(ops.split(ops.matmul(x, given, False, False), 1, 2).outputs(), [x, given])
    rows = ov.Model(
        ops.split(ops.matmul(y := ops.parameter([4, 6], np.float32), random(6, 8), False, False), 0, 2).outputs(), [y]
    )
    for model in (gated(parts=3), by_input, rows):
        assert rewrite(model) == {"gates": 0, "upsampling": 0}


def enlarged(
    shape: tuple[int, int, int, int],
    taps: np.ndarray,
    *,
    by: float = 2.0,
    mode: str = "nearest",
    nearest: str = "floor",
    strides: int = 1,
    pads: int = 1,
    stored: type = np.float32,
) -> Any:
    x = ops.parameter(list(shape), np.float32, "x")
    how: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": nearest}
    y = ops.interpolate(x, np.array([by, by], np.float32), mode, "scales", axes=np.array([2, 3]), **how)
    y = ops.convolution(y, weight(taps, stored), [strides] * 2, [pads] * 2, [pads] * 2, [1, 1])
    return ov.Model([ops.add(y, random(1, len(taps), 1, 1, seed=3))], [x])


@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 4, 5, 7), (3, 8, 6, 6), (1, 1, 1, 1)])
def test_an_enlarged_picture_is_convolved_when_it_is_small(shape: tuple[int, int, int, int], stored: type) -> None:
    """Against torch in float64; borders among it."""
    taps, x = random(6, shape[1], 3, 3, seed=1).astype(stored).astype(np.float32), random(*shape, seed=2)
    large = torch.nn.functional.interpolate(torch.from_numpy(x).double(), scale_factor=2.0, mode="nearest")
    expected = torch.nn.functional.conv2d(large, torch.from_numpy(taps).double(), padding=1).numpy()
    model = enlarged(shape, taps, stored=stored)
    assert rewrite(model) == {"gates": 0, "upsampling": 1}
    found, kinds = run(model, x)
    np.testing.assert_allclose(found, expected + random(1, 6, 1, 1, seed=3), atol=1e-5)
    assert "Interpolate" not in kinds and "Deconvolution" in kinds


@pytest.mark.parametrize(
    "changes",
    [{"by": 3.0}, {"mode": "linear_onnx"}, {"nearest": "ceil"}, {"strides": 2}, {"pads": 0}, {"taps": 1}],
    ids=str,
)
def test_what_is_enlarged_otherwise_is_left(changes: dict[str, Any]) -> None:
    size = changes.pop("taps", 3)
    model = enlarged((1, 4, 6, 6), random(4, 4, size, size), **changes)
    assert rewrite(model) == {"gates": 0, "upsampling": 0}


def test_the_engine_draws_with_them(tiny_artifact: Path) -> None:
    """Of the tiny student: no gate is large; an enlargement in the network and three in its decoder. That it
    draws what onnxruntime draws is what the backends' own tests say."""
    core, found = ov.Core(), {}
    for name in ("denoiser", "decoder"):
        model = core.read_model(tiny_artifact / f"{name}.onnx")
        model.reshape(
            {port.any_name: [1, *[d.get_length() for d in list(port.partial_shape)[1:]]] for port in model.inputs}
        )
        found[name] = rewrite(model)
    assert found == {"denoiser": {"gates": 0, "upsampling": 1}, "decoder": {"gates": 0, "upsampling": 3}}
