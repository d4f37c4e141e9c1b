"""The whole sampler as one graph: text encoder, every step of a plan with its update, decoder.

It is put together from the stage graphs, not traced again, so both forms hold the same arithmetic. The steps share the
denoiser's weights; the noise-corrected update is two multiplications and an addition per step (core.update).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import helper, numpy_helper

from ..core.update import UpdateTable
from .onnx import StageGraph
from .weights import WeightRef

NOISE, FRESH_NOISE = "noise", "fresh_noise"


class _Builder:
    """Collects the nodes, constants and weights of the graph under construction."""

    def __init__(self) -> None:
        self.graph = onnx.GraphProto()
        self.weights: dict[str, WeightRef] = {}
        self._known: set[str] = set()

    def inline(self, stage: StageGraph, name: str, run: str, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Copies a stage's nodes. Weights and constants are named after the stage, values after this run of it."""
        fixed = {*stage.weights, *(tensor.name for tensor in stage.graph.initializer)}
        names = {value.name: bound for value, bound in zip(stage.graph.input, inputs, strict=True)}
        names |= {value.name: bound for value, bound in zip(stage.graph.output, outputs, strict=True)}
        names |= {value: f"{name}/{value}" for value in fixed} | {"": ""}
        for node in stage.graph.node:
            copy = self.graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [names.get(value, f"{run}/{value}") for value in node.input]
            copy.output[:] = [names.get(value, f"{run}/{value}") for value in node.output]
            copy.name = f"{run}/{node.name}" if node.name else run
        self.weights |= {f"{name}/{weight}": ref for weight, ref in stage.weights.items()}
        for tensor in stage.graph.initializer:
            self._initializer(tensor, f"{name}/{tensor.name}")

    def constant(self, name: str, value: ArrayLike, dtype: type = np.float32) -> str:
        self._initializer(numpy_helper.from_array(np.asarray(value, dtype=dtype)), name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _initializer(self, tensor: onnx.TensorProto, name: str) -> None:
        if name not in self._known:
            self._known.add(name)
            copy = self.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = name


def sampler_graph(
    denoiser: StageGraph,
    decoder: StageGraph,
    table: UpdateTable,
    network_times: ArrayLike,
    *,
    text_encoder: StageGraph | None = None,
) -> StageGraph:
    """noise float32 (B, C, h, w) and the text -> images uint8 (B, H, W, 3), finite bool (B,); unrolled over `table`.

    The text is what the text encoder takes or, without one, the conditions that it gives: then a prompt cache can keep
    them; a guidance scale (B,) comes with them where the denoiser is told one. noise is unit Gaussian; a plan that re-noises
    also takes fresh_noise (B, k, C, h, w), that of its k steps which do. network_times: what the denoiser is told at each
    step, (n_steps,).
    """
    build = _Builder()
    conditions = [value.name for value in denoiser.graph.input[2:]]
    told = denoiser.graph.input[2:]
    if text_encoder is not None:
        given = [value.name for value in text_encoder.graph.input]
        encoded = len(text_encoder.graph.output)
        build.inline(text_encoder, "text_encoder", "text_encoder", given, conditions[:encoded])
        told = [*text_encoder.graph.input, *denoiser.graph.input[2 + encoded :]]
    batch = build.node("Shape", [NOISE], "batch_size", start=0, end=1)
    x = NOISE if table.start == 1.0 else build.node("Mul", [NOISE, build.constant("start", table.start)], "x_T")
    for i, time in enumerate(np.asarray(network_times, dtype=np.float64)):
        time_now = build.node("Expand", [build.constant(f"time_{i}", [time]), batch], f"timestep_{i}")
        build.inline(denoiser, "denoiser", f"step_{i}", [x, time_now, *conditions], [f"m_{i}"])
        kept = build.node("Mul", [x, build.constant(f"a_{i}", table.a[i])], f"a_x_{i}")
        moved = build.node("Mul", [f"m_{i}", build.constant(f"b_{i}", table.b[i])], f"b_m_{i}")
        x = build.node("Add", [kept, moved], f"x_{i}")
        if i in table.renoised:
            which = build.constant(f"draw_{i}", table.renoised.index(i), np.int64)
            z = build.node("Gather", [FRESH_NOISE, which], f"z_{i}", axis=1)
            x = build.node(
                "Add", [x, build.node("Mul", [z, build.constant(f"c_{i}", table.c[i])], f"c_z_{i}")], f"noised_{i}"
            )
    build.inline(decoder, "decoder", "decoder", [x], [value.name for value in decoder.graph.output])
    build.graph.input.extend(told)
    noise = build.graph.input.add()
    noise.CopyFrom(denoiser.graph.input[0])
    noise.name = NOISE
    if table.renoised:
        build.graph.input.append(_fresh_noise(denoiser.graph.input[0], len(table.renoised)))
    build.graph.output.extend(decoder.graph.output)
    stages = [stage for stage in (text_encoder, denoiser, decoder) if stage is not None]
    islands = frozenset().union(*(stage.islands for stage in stages))
    return StageGraph(build.graph, build.weights, denoiser.opset, islands)


def _fresh_noise(latents: onnx.ValueInfoProto, steps: int) -> onnx.ValueInfoProto:
    """(B, k, C, h, w): one draw of the latents' shape for each step that re-noises."""
    batch, *rest = latents.type.tensor_type.shape.dim
    shape = [batch.dim_param or batch.dim_value, steps, *(dim.dim_value for dim in rest)]
    return helper.make_tensor_value_info(FRESH_NOISE, latents.type.tensor_type.elem_type, shape)
