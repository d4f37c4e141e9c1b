"""Lowering to float16 and bfloat16: types, casts, weights, rounding, and the emulation of a machine that has them."""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from imagine_flash.export.lowering import TYPES, emulate
from imagine_flash.export.precision import CHECK, find_islands
from imagine_flash.export.weights import WEIGHTS_FILE
from imagine_flash.tests.lowering_cases import (
    NUMPY,
    OPSETS,
    TORCH,
    error,
    export,
    graph,
    inferred,
    modules_of,
    real_cases,
    torch_output,
)

STAGES = ("text_encoder", "denoiser", "decoder", "tiny_decoder")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return real_cases(tmp_path_factory.mktemp)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.slow), 23])  # each exports anew
@pytest.mark.parametrize("name", STAGES)
def test_a_real_stage_is_typed_strongly_and_as_exact_as_torch(real, name, opset, precision):
    case = real(name, opset)
    islands = case.islands(precision)
    assert set(islands) == {"denoiser": {"unet.time_proj"}, "text_encoder": set()}.get(name, {CHECK})
    lowered = case.lower(precision, islands)
    types = inferred(lowered, case.store)
    for before, after in (
        (case.stage.graph.input, lowered.graph.input),
        (case.stage.graph.output, lowered.graph.output),
    ):
        assert list(before) == list(after), "the interface changed"
    if precision == "fp16" or opset > 20:  # bf16 at opset 20: no Conv, InstanceNormalization, Round
        half = [value for value in case.stage.weights if types[value] == TYPES[precision]]
        assert len(half) == len(case.stage.weights), "a weight outside the islands was not lowered"
    want = torch_output(case.module, case.feed, torch.float32)
    theirs = error(torch_output(case.module, case.feed, TORCH[precision]), want)
    assert error(case.run(emulate(lowered)), want) <= 2 * theirs + 1e-4
    if precision == "fp16":  # onnxruntime's CPU provider has no bfloat16 kernels
        assert error(case.run(lowered), want) <= 2 * theirs + 1e-4


def test_values_change_type_in_one_cast_each(real):
    case = real("denoiser", 23)
    lowered = case.lower("fp16", case.islands("fp16"))
    casts = {node.input[0]: node.output[0] for node in lowered.graph.node if node.op_type == "Cast"}
    angles = next(node for node in case.stage.graph.node if node.op_type == "Gemm").input[0]
    assert set(casts) == {"latents", "embeddings", angles, "m:fp16"} and casts["m:fp16"] == "m"
    assert lowered.islands == {"unet.time_proj"}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_of_islands_is_the_stage(real, name):
    case = real(name, 23)
    islands = modules_of(case.stage)
    lowered = case.lower("fp16", islands | {"no.such.module"})
    assert lowered.graph == case.stage.graph and lowered.weights == case.stage.weights
    assert lowered.islands <= islands, "an island that no node has was reported"
    np.testing.assert_array_equal(case.run(emulate(lowered)), case.run(case.stage))


@pytest.mark.slow
def test_the_search_rounds_weights_as_the_file_does_and_leaves_nothing(real):
    case = real("denoiser", 23)
    folder, size = case.store.path.parent, case.store.path.stat().st_size
    found = find_islands(case.stage, case.store, "bf16", [case.feed], limit=1.0)
    assert [path.name for path in folder.iterdir()] == [WEIGHTS_FILE] and case.store.path.stat().st_size == size
    want = case.run(case.stage)
    assert found.error == pytest.approx(error(case.emulated("bf16", found.modules), want), rel=1e-12)


@pytest.mark.parametrize("precision", TYPES)
def test_an_angle_needs_float32(real, precision):
    """The half type knows 999 rad to a fraction of a turn at best: the embedding of the time would be another one."""
    case = real("denoiser", 23)
    islands = case.islands(precision)
    assert "999" in islands["unet.time_proj"]
    want = case.run(case.stage)
    assert error(case.emulated(precision, islands), want) < error(case.emulated(precision), want)


def test_groups_are_added_until_the_error_is_allowed(real):
    case = real("text_encoder", 23)
    plain = find_islands(case.stage, case.store, "bf16", [case.feed], limit=1.0)
    assert plain.modules == {}
    norms = {node.name for node in case.stage.graph.node if node.op_type == "LayerNormalization"}
    some = find_islands(case.stage, case.store, "bf16", [case.feed], limit=0.99 * plain.error)
    assert norms <= set(some.modules) < modules_of(case.stage) and some.error <= 0.99 * plain.error
    assert all(f"{plain.error:.2g}" in some.modules[name] for name in norms)


def test_the_whole_stage_is_the_last_resort(real):
    case = real("text_encoder", 23)
    found = find_islands(case.stage, case.store, "bf16", [case.feed], limit=0.0)
    assert found.error == 0.0 and any("the whole stage" in reason for reason in found.modules.values())
    np.testing.assert_array_equal(case.run(case.lower("bf16", found.modules)), case.run(case.stage))


def test_float16_weights_are_shared_not_stored_again(tmp_path):
    module = torch.nn.Linear(32, 32).half().float()
    case = export(tmp_path, module, {"x": torch.randn(2, 32)})
    size = case.store.path.stat().st_size
    lowered = case.lower("fp16")
    assert case.store.path.stat().st_size == size and len(lowered.weights) == len(case.stage.weights) == 1
    case.lower("bf16")
    assert size < case.store.path.stat().st_size <= size * 2


class Tied(torch.nn.Module):
    """One weight, read by `first` and by `second`."""

    def __init__(self, lossless: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 32, bias=False)
        if lossless:
            self.first.half().float()
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("precision", TYPES)
def test_a_weight_of_both_types_exists_once_and_is_exact_in_the_island(tmp_path, lossless, precision):
    case = export(tmp_path, Tied(lossless), {"x": torch.randn(2, 32)})
    lowered = case.lower(precision, {"first"})
    inferred(lowered, case.store)
    assert len(lowered.weights) == len(case.stage.weights) == 1
    (name,) = lowered.weights
    assert [n.op_type for n in lowered.graph.node if name in n.input].count("Cast") == 1
    weight = case.module.first.weight.detach().numpy().T  # (in, out)
    half = NUMPY[precision]
    x = case.feed["x"]
    first = (x @ weight).astype(half).astype(np.float32)
    want = (first @ weight.astype(half).astype(np.float32)).astype(half).astype(np.float32)
    ulp = float(ml_dtypes.finfo(half).eps)
    np.testing.assert_allclose(case.run(emulate(lowered)), want, rtol=2 * ulp, atol=1e-3 * ulp)


@pytest.mark.parametrize("precision", TYPES)
def test_emulation_rounds_to_nearest(tmp_path, precision):
    x = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32) * np.float32(100)
    case = graph(tmp_path, [helper.make_node("Neg", ["x"], ["y"], "neg")], {}, x)
    np.testing.assert_array_equal(case.emulated(precision), -x.astype(NUMPY[precision]).astype(np.float32))


@pytest.mark.parametrize(("precision", "want"), [("fp16", np.inf), ("bf16", 120.0)])
def test_emulation_overflows_where_a_machine_would(tmp_path, precision, want):
    """onnxruntime's CPU provider computes float16 neighbours in float32 and gives 120 for this float16 graph."""
    nodes = [
        helper.make_node("Mul", ["x", "up"], ["big"], "up"),
        helper.make_node("Mul", ["big", "down"], ["y"], "down"),
    ]
    case = graph(tmp_path, nodes, {"up": np.float32(3e4), "down": np.float32(1e-3)}, np.full((1, 4), 4, np.float32))
    np.testing.assert_allclose(case.emulated(precision), want, rtol=2**-7)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resize_keeps_its_scales_in_float32(tmp_path, mode, opset, precision):
    case = export(tmp_path, torch.nn.Upsample(scale_factor=2, mode=mode), {"x": torch.randn(2, 3, 4, 4)}, opset=opset)
    lowered = case.lower(precision)
    types = inferred(lowered, case.store)
    node = next(node for node in lowered.graph.node if node.op_type == "Resize")
    assert types[node.input[0]] == types[node.output[0]] == TYPES[precision]
    assert all(types[value] == TensorProto.FLOAT for value in node.input[1:3] if value)
    half = NUMPY[precision]
    want = torch.nn.functional.interpolate(
        torch.from_numpy(case.feed["x"].astype(half).astype(np.float32)), scale_factor=2, mode=mode
    )
    np.testing.assert_allclose(case.run(emulate(lowered)), want, rtol=float(ml_dtypes.finfo(half).eps))


def test_integers_become_half_and_counts_stay_integers(tmp_path):
    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return x * ids.float() + torch.full_like(x, 0.5)

    case = export(tmp_path, Scale(), {"x": torch.randn(2, 5), "ids": torch.arange(10).reshape(2, 5)})
    lowered = case.lower("fp16")
    types = inferred(lowered, case.store)
    casts = [node for node in lowered.graph.node if node.op_type == "Cast"]
    assert [types[node.output[0]] for node in casts if node.input[0] == "ids"] == [TensorProto.FLOAT16]
    assert error(case.run(emulate(lowered)), case.run(case.stage)) < 2**-10
