"""Lowering to float16 and bfloat16: types, rounding, and the modules that are found to need float32."""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from imagine_flash.core.errors import ArtifactError
from imagine_flash.export.architectures import stages_of
from imagine_flash.export.onnx import StageGraph, _export, save_graph
from imagine_flash.export.precision import TYPES, emulate, find_islands, lower, run_graph
from imagine_flash.export.weights import WEIGHTS_FILE, WeightStore
from imagine_flash.tests import pipelines

OPSETS = (20, 23)  # decomposed attention and GroupNorm; native ones
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
STAGES = ("text_encoder", "denoiser", "decoder", "tiny_decoder")


@dataclass(frozen=True)
class Case:
    """One torch module, its graph, and an input to run both on."""

    module: torch.nn.Module
    stage: StageGraph
    store: WeightStore
    feed: dict[str, np.ndarray]

    def run(self, stage: StageGraph) -> np.ndarray:
        return next(iter(run_graph(stage, self.store, [self.feed])[0].values()))

    def islands(self, precision: str, limit: float = float("inf")) -> dict[str, str]:
        return find_islands(self.stage, self.store, precision, [self.feed], limit=limit).modules

    def lower(self, precision: str, islands=()) -> StageGraph:
        return lower(self.stage, self.store, precision, islands)

    def emulated(self, precision: str, islands=()) -> np.ndarray:
        return self.run(emulate(self.lower(precision, islands)))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(stage, opset) -> Case: the tiny real networks, each exported once."""

    @cache
    def parts(vae: str):
        stages = stages_of(pipelines.build_pipeline(vae=vae))
        ids = stages.encode_prompts(pipelines.CAPTIONS[:3])["input_ids"]
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            embeddings = stages.text_encoder(ids)[0]
        denoised = {"latents": latents, "timestep": torch.tensor([999.0, 666.0, 1.0]), "embeddings": embeddings}
        return {
            "text_encoder": (stages.text_encoder, {"input_ids": ids}, ("embeddings",)),
            "denoiser": (stages.denoiser(stages.default_size), denoised, ("m",)),
            "decoder": (stages.decoder, {"latents": latents}, ("images",)),
        }

    @cache
    def build(name: str, opset: int) -> Case:
        vae, part = ("tiny", "decoder") if name == "tiny_decoder" else ("kl", name)
        module, inputs, outputs = parts(vae)[part]
        return export(tmp_path_factory.mktemp(name), module, inputs, outputs, opset)

    return build


def export(folder: Path, module, inputs: dict[str, torch.Tensor], outputs=("y",), opset: int = 23) -> Case:
    store = WeightStore(folder / WEIGHTS_FILE)
    with torch.inference_mode():
        stage = _export(module.eval(), inputs, outputs, store, opset)
    return Case(module, stage, store, {name: tensor.numpy() for name, tensor in inputs.items()})


def graph(folder: Path, nodes, constants: dict[str, Any], x: np.ndarray, opset: int = 23) -> Case:
    """A graph spelt out: "x" -> "y", float32."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *x.shape[1:]]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    proto = helper.make_graph(nodes, "case", ends[:1], ends[1:], tensors)
    return Case(torch.nn.Identity(), StageGraph(proto, {}, opset), WeightStore(folder / WEIGHTS_FILE), {"x": x})


def modules_of(stage: StageGraph) -> set[str]:
    return {node.name for node in stage.graph.node}


def inferred(stage: StageGraph, store: WeightStore) -> dict[str, int]:
    """The types of all values; raises where they contradict one another."""
    path = store.path.parent / "strict.onnx"
    save_graph(stage, path)
    onnx.checker.check_model(str(path))
    model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    path.unlink()
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in model.graph.initializer
    }


def error(got: np.ndarray, want: np.ndarray) -> float:
    """RMS of the difference, relative to the RMS of the values; of images, in 0..1."""
    difference = np.sqrt(np.mean((got.astype(np.float64) - want.astype(np.float64)) ** 2))
    return float(difference / (255.0 if want.dtype == np.uint8 else np.sqrt(np.mean(want.astype(np.float64) ** 2))))


@torch.inference_mode()
def torch_output(module: torch.nn.Module, feed: dict[str, np.ndarray], dtype: torch.dtype) -> np.ndarray:
    inputs = [torch.from_numpy(array) for array in feed.values()]
    output = copy.deepcopy(module).to(dtype)(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    output = output[0] if isinstance(output, tuple) else output
    return (output.float() if output.is_floating_point() else output).numpy()


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", STAGES)
def test_a_real_stage_is_typed_strongly_and_as_exact_as_torch(real, name, opset, precision):
    case = real(name, opset)
    islands = case.islands(precision)
    assert set(islands) == ({"unet.time_proj"} if name == "denoiser" else set())
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


def test_the_search_rounds_weights_as_the_file_does_and_leaves_nothing(real):
    case = real("denoiser", 23)
    folder, size = case.store.path.parent, case.store.path.stat().st_size
    found = find_islands(case.stage, case.store, "bf16", [case.feed], limit=1.0)
    assert [path.name for path in folder.iterdir()] == [WEIGHTS_FILE] and case.store.path.stat().st_size == size
    want = case.run(case.stage)
    assert found.error == pytest.approx(error(case.emulated("bf16", found.modules), want), rel=1e-12)


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


class Overflow(torch.nn.Module):
    """`b` reaches 1e5, `c` scales it back: only those two see it."""

    def __init__(self) -> None:
        super().__init__()
        for name, scale in (("a", 300.0), ("b", 400.0), ("c", 1e-5), ("d", 1.0)):
            layer = torch.nn.Linear(32, 32, bias=False)
            torch.nn.init.eye_(layer.weight)
            layer.weight.data *= scale
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_an_overflow_is_found_where_it_is(tmp_path):
    case = export(tmp_path, Overflow(), {"x": torch.linspace(-1, 1, 64).reshape(2, 32)})
    assert not np.isfinite(case.emulated("fp16")).all()
    found = find_islands(case.stage, case.store, "fp16", [case.feed], limit=1e-2)
    assert set(found.modules) == {"b", "c"}
    assert all("1.2e+05" in reason and "\n" not in reason for reason in found.modules.values())
    assert found.error == error(case.emulated("fp16", found.modules), case.run(case.stage)) < 1e-3
    assert case.islands("bf16") == {}, "bfloat16 has float32's range"


def test_a_weight_beyond_the_range_is_found(tmp_path):
    case = graph(
        tmp_path,
        [helper.make_node("Mul", ["x", "w"], ["z"], "wide"), helper.make_node("Neg", ["z"], ["y"], "sign")],
        {"w": np.array([2e4, 1.0], np.float32)},
        np.full((1, 2), 1e-3, np.float32),
    )
    assert set(case.islands("fp16")) == {"wide"}


class Attend(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x / 200.0)


class Logits(torch.nn.Module):
    """Queries and keys of norm 800: logits of 800 * 800 / sqrt(16) = 160000 from values of 200."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.attend, self.out = torch.nn.Linear(16, 16, bias=False), Attend(), torch.nn.Identity()
        torch.nn.init.eye_(self.gain.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.gain(x).unflatten(0, (-1, 1))  # (B, 1, L, 16)
        return self.attend(heads).flatten(0, 1) * 2.0


@pytest.mark.parametrize("opset", OPSETS)
def test_attention_logits_beyond_the_range_are_found_inside_the_operator(tmp_path, opset):
    case = export(tmp_path, Logits(), {"x": torch.full((3, 8, 16), 200.0)}, opset=opset)
    assert ("Attention" in {node.op_type for node in case.stage.graph.node}) == (opset == 23)
    islands = case.islands("fp16")
    assert set(islands) == {"attend"} and "1.6e+05" in islands["attend"]
    types = inferred(lowered := case.lower("fp16", islands), case.store)
    kinds = {types[v] for n in lowered.graph.node if n.op_type in ("Attention", "Softmax") for v in n.output}
    assert kinds == {TensorProto.FLOAT}
    np.testing.assert_allclose(case.run(emulate(lowered)), 2.0, rtol=2**-9)


@pytest.mark.parametrize(("given", "bound"), [({}, 1.8e5), ({"scale": 0.25}, 9e4), ({"scale": 0.01}, None)])
def test_the_bound_of_packed_heads_is_per_head(tmp_path, given, bound):
    """Two heads of size 4 side by side, all 300: rows of norm 600, 600 * 600 / sqrt(4) = 180000."""
    node = helper.make_node("Attention", ["x"] * 3, ["y"], "attend", q_num_heads=2, kv_num_heads=2, **given)
    case = graph(tmp_path, [node], {}, np.full((1, 3, 8), 300, np.float32))
    islands = case.islands("fp16")
    assert set(islands) == ({"attend"} if bound else set())
    assert bound is None or f"logits up to {bound:.3g}" in islands["attend"]


class Masked(torch.nn.Module):
    """Causal attention with a float mask: large enough to be a stored weight (40 x 40), or a scalar of Where."""

    def __init__(self, low: float, stored: bool) -> None:
        super().__init__()
        allowed = torch.ones(40, 40, dtype=torch.bool).tril()
        self.register_buffer("mask", torch.zeros(40, 40).masked_fill(~allowed, low) if stored else allowed)
        self.low, self.stored = low, stored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.mask if self.stored else torch.where(self.mask[None] & (x[:, :1, :1] < 1e3), 0.0, self.low)
        return torch.softmax(x @ x.transpose(1, 2) + mask, dim=-1) @ x


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("low", [float("-inf"), float(np.finfo(np.float32).min), -1e9])
def test_a_mask_is_bounded_and_no_island(tmp_path, low, stored, precision):
    case = export(tmp_path, Masked(low, stored), {"x": torch.randn(2, 40, 8)})
    assert case.islands(precision) == {}
    lowered = case.lower(precision)
    inferred(lowered, case.store)
    constants = [numpy_helper.to_array(tensor) for tensor in lowered.graph.initializer]
    constants += [case.store.read(ref) for ref in lowered.weights.values()]
    assert all(np.isfinite(values.astype(np.float32)).all() for values in constants if values.dtype != np.int64)
    assert error(case.run(emulate(lowered)), case.run(case.stage)) < 8 * float(ml_dtypes.finfo(NUMPY[precision]).eps)


def test_a_large_activation_beside_a_mask_still_counts(tmp_path):
    nodes = [
        helper.make_node("Where", ["mask", "x", "low"], ["z"], "choose"),
        helper.make_node("Softmax", ["z"], ["y"], "softmax"),
    ]
    constants = {"mask": np.array([True, True, False]), "low": np.float32(np.finfo(np.float32).min)}
    case = graph(tmp_path, nodes, constants, np.array([[1e5, 0.0, 0.0]], np.float32))
    assert set(case.islands("fp16")) == {"choose", "softmax"}
    case = graph(tmp_path, nodes, constants, np.array([[10.0, 0.0, 0.0]], np.float32))
    assert case.islands("fp16") == {}


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


@pytest.mark.parametrize("precision", TYPES)
def test_an_angle_needs_float32(real, precision):
    """The half type knows 999 rad to a fraction of a turn at best: the embedding of the time would be another one."""
    case = real("denoiser", 23)
    islands = case.islands(precision)
    assert "999" in islands["unet.time_proj"]
    want = case.run(case.stage)
    assert error(case.emulated(precision, islands), want) < error(case.emulated(precision), want)


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


@pytest.mark.parametrize(
    ("precision", "feeds", "message"),
    [
        ("int8", [{}], "precision must be one of fp16, bf16, got 'int8'"),
        ("", [{}], "precision must be one of fp16, bf16, got ''"),
        ("fp16", [], "at least one"),
    ],
)
def test_bad_input(tmp_path, precision, feeds, message):
    case = graph(tmp_path, [helper.make_node("Neg", ["x"], ["y"])], {}, np.zeros((1, 2), np.float32))
    with pytest.raises(ArtifactError, match=message):
        find_islands(case.stage, case.store, precision, feeds, limit=1.0)
    if feeds:
        with pytest.raises(ArtifactError, match=message):
            lower(case.stage, case.store, precision, ())
