"""The modules that are found to need float32: angles, overflows, logits, and what the error that is left asks for."""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
import re
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from imagine_flash.core.errors import ArtifactError
from imagine_flash.export.precision import TYPES, emulate, find_islands, lower
from imagine_flash.tests.lowering_cases import NUMPY, OPSETS, error, export, graph, inferred

CLEAR = Path("/proc/self/clear_refs")


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


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("low", [float("-inf"), float(np.finfo(np.float32).min), -1e9])
def test_a_mask_is_bounded_and_no_island(tmp_path, low, stored):
    case = export(tmp_path, Masked(low, stored), {"x": torch.randn(2, 40, 8)})
    for precision in TYPES:
        assert case.islands(precision) == {}
        lowered = case.lower(precision)
        inferred(lowered, case.store)
        constants = [numpy_helper.to_array(tensor) for tensor in lowered.graph.initializer]
        constants += [case.store.read(ref) for ref in lowered.weights.values()]
        floats = [values.astype(np.float32) for values in constants if values.dtype != np.int64]
        assert all(np.isfinite(values).all() for values in floats)
        eps = float(ml_dtypes.finfo(NUMPY[precision]).eps)
        assert error(case.run(emulate(lowered)), case.run(case.stage)) < 8 * eps


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


@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's /proc")
def test_no_value_is_kept_while_all_are_measured(tmp_path):
    """All values of a decoder were there at once, gigabytes of one of full size, since its own output ended the graph."""
    names = ["x", *(f"v{i}" for i in range(40)), "y"]
    nodes = [helper.make_node("Sigmoid", [a], [b], b) for a, b in pairwise(names)]
    case, size = graph(tmp_path, nodes, {}, np.zeros((1, 2**21), np.float32)), 2**23  # bytes of a value
    CLEAR.write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    find_islands(case.stage, case.store, "fp16", [case.feed], limit=1.0)
    assert resident("VmHWM") - before < 16 * size


def resident(kind: str) -> int:
    """Bytes of memory that this process has, or had at most."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


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
