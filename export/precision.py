"""Which modules of a network half precision cannot compute: found by rule, by range and by the error that is left."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ArtifactError, missing_extra
from .lowering import LARGEST, MOVES, TYPES, UNBOUNDED, emulate, float_nodes, half_type, inferred_values, lower, trial
from .onnx import StageGraph, save_graph
from .sessions import give_back_memory, is_large, open_session
from .weights import WeightStore

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise missing_extra(error.name or "onnx", "export") from None

__all__ = ["TYPES", "Islands", "emulate", "find_islands", "lower"]

HEADROOM = 4.0  # other prompts and seeds reach higher than those that were tried
MASKS = (*MOVES, "Where", "Add", "Sub", "Mul", "Min", "Max", "Cast", "Constant", "ConstantOfShape")
NORMALISATIONS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization", "ReduceMean")
ATTENTIONS = ("Softmax", "Attention")
CHECK = "all_finite"  # the module of pipelines.stages.Decoder

Modules = dict[str, str]  # module -> why it is an island
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Islands:
    """The modules to keep in float32, each with the reason in one line, and the error that is left with them.

    error: relative RMS error of the stage's outputs against float32 (images: RMS of levels / 255), the worst of all feeds.
    """

    modules: Modules
    error: float


def find_islands(
    stage: StageGraph, store: WeightStore, precision: str, feeds: Sequence[Arrays], *, limit: float
) -> Islands:
    """The modules of a float32 stage that `precision` cannot compute, and those that bring its error down to `limit`.

    feeds: inputs by name to try, at least one. First the angles of Sin and Cos and, for fp16, what comes within a factor
    of 4 of 65504; then, while the error is above `limit`: normalisations, attention, the first and last layers, the whole
    stage. Writes and removes probe graphs beside the store's file. Raises ArtifactError, MissingExtraError.
    """
    half = half_type(precision)
    if not feeds:
        raise ArtifactError("no feeds to measure the precision on; give at least one")
    peaks = _peaks(stage, store, feeds)
    modules = _angles(stage, peaks) | _sums(stage)
    if half == TensorProto.FLOAT16:
        modules = _out_of_range(stage, peaks, LARGEST[half]) | modules
    floats = {node.name for node in float_nodes(stage, peaks.types)}

    def measure() -> float:
        if floats <= set(modules):
            return 0.0
        runs = run_graph(trial(stage, store, precision, modules), store, feeds)
        return max(_error(got, want) for got, want in zip(runs, peaks.outputs, strict=True))

    error = measure()
    for group, members in _groups(stage, floats).items():
        added = sorted((members & floats) - set(modules))
        if not error <= limit and added:  # also true for NaN
            modules |= dict.fromkeys(added, f"{group}: the error is {error:.2g} without, the limit is {limit:.2g}")
            error = measure()
    return Islands(modules, error)


@dataclass(frozen=True)
class _Peaks:
    """What the float32 graph shows when it runs: the type and the largest absolute value of each value, and its outputs."""

    types: dict[str, int]
    values: dict[str, float]
    logits: dict[str, float]  # of native attention, by module: largest |q| |k| scale, which no logit exceeds
    outputs: list[Arrays]  # one for each feed


def _peaks(stage: StageGraph, store: WeightStore, feeds: Sequence[Arrays]) -> _Peaks:
    """Runs the graph once per feed with the maximum of each value as another output: scalars, so that no value is kept."""
    tensors = inferred_values(stage)
    types = {name: tensor.elem_type for name, tensor in tensors.items()}
    constants, masks = _constants(stage, store)
    masks = _masked(stage, masks)
    probe, largest, rows = _Probe(stage), dict[str, str](), list[tuple[str, str, str, float]]()

    def look(values: Iterable[str]) -> None:
        floats = [value for value in values if types.get(value) == TensorProto.FLOAT]
        largest.update((value, probe.largest(value, value in masks)) for value in floats)

    # onnxruntime computes what the last node that ends the graph needs, then the one before: measured from the last value to
    # the first, a value is gone once the next are there; in the graph's own order all were kept, gigabytes of a large decoder
    for node in reversed(stage.graph.node):
        look(node.output)
        if node.op_type == "Attention":
            rows.append((node.name, *probe.rows(node, tensors)))
    look(each.name for each in stage.graph.input)
    runs = probe.run(store, feeds)
    logits: dict[str, float] = defaultdict(float)
    for module, query, key, scale in rows:
        logits[module] = max(logits[module], *(float(run[query]) * float(run[key]) * scale for run in runs))
    found = {value: max(float(run[name]) for run in runs) for value, name in largest.items()}
    return _Peaks(types, constants | found, logits, [{v.name: run[v.name] for v in stage.graph.output} for run in runs])


class _Probe:
    """A graph with measurements as further outputs."""

    def __init__(self, stage: StageGraph) -> None:
        self.graph = onnx.GraphProto()
        self.graph.CopyFrom(stage.graph)
        self.stage = replace(stage, graph=self.graph)
        for value in stage.graph.output:  # none of them ends the graph: see _peaks
            size = self._add("Size", value.name)
            self.graph.output.append(helper.make_tensor_value_info(size, TensorProto.INT64, []))
        self._constant("probe:limit", UNBOUNDED)
        self._constant("probe:zero", 0.0)

    def largest(self, value: str, masked: bool) -> str:
        """The largest absolute value; of a value with a mask in it, without the masked elements."""
        size = self._add("Abs", value)
        if masked:
            size = self._add("Where", self._add("Less", size, "probe:limit"), size, "probe:zero")
        return self._output(size)

    def rows(self, node: onnx.NodeProto, tensors: Mapping[str, onnx.TypeProto.Tensor]) -> tuple[str, str, float]:
        """The largest norm of a query and of a key of an Attention node, and the scale of its logits."""
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        norms = []
        for value, count in zip(node.input[:2], ("q_num_heads", "kv_num_heads"), strict=True):
            size = tensors[value].shape.dim[-1].dim_value
            if len(tensors[value].shape.dim) == 3:  # (B, L, heads * size)
                size //= given[count]
                value = self._add("Reshape", value, self._add("Constant", value_ints=[0, 0, given[count], -1]))
            norms.append(self._output(self._add("ReduceL2", value, self._add("Constant", value_ints=[-1]), keepdims=0)))
        return norms[0], norms[1], float(given.get("scale", max(size, 1) ** -0.5))

    def run(self, store: WeightStore, feeds: Sequence[Arrays]) -> list[Arrays]:
        return run_graph(self.stage, store, feeds)

    def _output(self, value: str) -> str:
        name = self._add("ReduceMax", value, keepdims=0)
        self.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        return name

    def _constant(self, name: str, value: float) -> None:
        self.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))

    def _add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"probe:{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name


def _constants(stage: StageGraph, store: WeightStore) -> tuple[dict[str, float], set[str]]:
    """The largest absolute value of each weight and small float constant, masks left out; the names of the masks."""
    peaks: dict[str, float] = {}
    masks: set[str] = set()

    def look(name: str, values: NDArray[Any]) -> None:
        sizes = np.abs(values)
        masks.update({name} if (sizes >= UNBOUNDED).any() else ())
        peaks[name] = float(sizes[sizes < UNBOUNDED].max(initial=0.0))

    for tensor in stage.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            look(tensor.name, numpy_helper.to_array(tensor))
    for name, ref in stage.weights.items():
        look(name, store.read(ref))
    for node in stage.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                look(node.output[0], numpy_helper.to_array(attribute.t))
    return peaks, masks


def _masked(stage: StageGraph, masks: set[str]) -> set[str]:
    """The values that hold elements of the constants `masks`."""
    for node in stage.graph.node:
        if node.op_type in MASKS and masks.intersection(node.input):
            masks = masks.union(node.output)
    return masks


def _angles(stage: StageGraph, peaks: _Peaks) -> Modules:
    """Sin and Cos, and the float values that lead to them: an angle of 999 is known to 0.25 in float16, to 2 in bfloat16."""
    modules: Modules = {}
    angles: dict[str, float] = {}  # value -> the largest angle that it leads to
    for node in reversed(stage.graph.node):
        found = [angles[value] for value in node.output if value in angles]
        if node.op_type in ("Sin", "Cos"):
            found.append(peaks.values[node.input[0]])
        if found:
            modules[node.name] = f"leads to the angle of a Sin or Cos, up to {max(found):.4g}"
            floats = [value for value in node.input if peaks.types.get(value) == TensorProto.FLOAT]
            angles |= {value: max(*found, angles.get(value, 0.0)) for value in floats}
    return modules


def _sums(stage: StageGraph) -> Modules:
    """The decoder's check for NaN and Inf, which adds up a whole picture and must not find Inf by itself."""
    return {node.name: "adds up the picture" for node in stage.graph.node if node.name == CHECK}


def _out_of_range(stage: StageGraph, peaks: _Peaks, largest: float) -> Modules:
    """The modules that read, compute or hold a number within HEADROOM of the largest."""
    reached: dict[str, float] = defaultdict(float)
    for node in float_nodes(stage, peaks.types):
        seen = (peaks.values.get(value, 0.0) for value in (*node.input, *node.output))
        reached[node.name] = max(reached[node.name], *seen)
    ends = f"fp16 ends at {largest:.0f}"
    modules = {
        name: f"attention logits up to {peak:.3g}; {ends}"
        for name, peak in peaks.logits.items()
        if peak > largest / HEADROOM
    }
    return modules | {
        name: f"values up to {peak:.3g}; {ends}" for name, peak in reached.items() if peak > largest / HEADROOM
    }


def _groups(stage: StageGraph, floats: set[str]) -> dict[str, set[str]]:
    """What to add while the error is above the limit, in this order."""

    def holding(kinds: Collection[str]) -> set[str]:
        return {node.name for node in stage.graph.node if node.op_type in kinds}

    inputs, outputs = ({value.name for value in values} for values in (stage.graph.input, stage.graph.output))
    forwards = [(node, node.input, node.output) for node in stage.graph.node]
    backwards = [(node, node.output, node.input) for node in reversed(stage.graph.node)]
    return {
        "normalisation": holding(NORMALISATIONS),
        "attention": holding(ATTENTIONS),
        "first and last layers": _reached(stage, inputs, forwards) | _reached(stage, outputs, backwards),
        "the whole stage": floats,
    }


def _reached(stage: StageGraph, values: set[str], steps: Iterable[Any]) -> set[str]:
    """The modules on the way from `values` up to and with the first that has a large weight."""
    modules = set()
    for node, before, after in steps:
        if values.intersection(before):
            modules.add(node.name)
            if not any(value in stage.weights for value in node.input):
                values = values.union(after)
    return modules


def _error(got: Arrays, want: Arrays) -> float:
    """Relative RMS error, of uint8 images the RMS of the levels / 255; infinite where a number is not finite."""
    errors = []
    for name, expected in want.items():
        exact = expected.astype(np.float64)
        error = float(np.sqrt(np.mean((got[name].astype(np.float64) - exact) ** 2)))
        scale = 255.0 if expected.dtype == np.uint8 else float(np.sqrt(np.mean(exact**2)))
        errors.append(0.0 if error == 0.0 else error / scale if scale > 0.0 and np.isfinite(error) else float("inf"))
    return max(errors)


def run_graph(stage: StageGraph, store: WeightStore, feeds: Sequence[Arrays]) -> list[Arrays]:
    """All outputs of a graph, by name, for each feed, in onnxruntime on the CPU; leaves no file."""
    path = store.path.parent / f".probe-{uuid.uuid4().hex}.onnx"  # external weights lie in the graph's folder
    try:
        save_graph(stage, path)
        session = open_session(path)
    finally:
        path.unlink(missing_ok=True)
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, feed) for feed in feeds]
    del session
    if is_large(path):
        give_back_memory()
    return [{name: np.asarray(value) for name, value in zip(names, run, strict=True)} for run in runs]
