"""What the machine could do: its matrix rates and bandwidth, measured in the same run, and the operations of each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ImagineFlashError
from ...folders.manifests import STAGES, ArtifactManifest, Size
from ..harness import Candidate, measure
from ..schema import FEWEST_ROUNDS, Case, Check, compare

MATRIX = 2048
COPIED = 2**28  # bytes
RATES = {"fp32": "float32 matrices", "bf16": "bfloat16 matrices", "int8": "int8 matrices"}
COPY = "copy of 256 MiB"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one call of a graph: the operations of its products, and how many weights it reads."""

    operations: float
    weights: float


def measure_floor(size: int = MATRIX, rounds: int = 2 * FEWEST_ROUNDS) -> Case:
    """Products of two square matrices in three precisions, and a copy in memory, by torch (oneDNN) on all of its threads."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 8, (size, size), dtype=torch.int8, generator=generator) for _ in range(2))
    exact = (left.double() @ right.double()).numpy()
    in_float, in_half = ((left.to(kind), right.to(kind)) for kind in (torch.float32, torch.bfloat16))
    run: dict[str, Callable[[], Any]] = {
        RATES["fp32"]: partial(torch.mm, *in_float),
        RATES["bf16"]: partial(torch.mm, *in_half),
        RATES["int8"]: partial(torch._int_mm, left, right),
    }
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    run[COPY] = lambda: target.copy_(source)

    def check(candidate: Candidate) -> Check:
        found = candidate.run()
        if candidate.name == COPY:
            return compare("copied values", found[::4096].numpy(), np.ones(len(source) // 4096), 0.0)
        allowed = 2**-7 * np.abs(exact).max() if candidate.name == RATES["bf16"] else 0.0
        return compare("values from float64's", found.double().numpy(), exact, float(allowed))

    candidates = [Candidate(name=name, run=work) for name, work in run.items()]
    case = {"what": "floor", "matrix": size, "threads": torch.get_num_threads()}
    row = measure(candidates, baseline=RATES["fp32"], check=check, case=case, warm_up=2, n=rounds, repeats=1)
    numbers = {name: {"GFLOP/s": round(2 * size**3 / row[name].min_us / 1e3, 1)} for name in RATES.values()}
    return row.with_extra({**numbers, COPY: {"GB/s": round(2 * COPIED / row[COPY].min_us / 1e3, 1)}})


def floor_seconds(work: Work, floor: Case, precision: str) -> float:
    """The least that a call may take: its operations at the measured rate, or reading its weights once."""
    rate = floor.extra[RATES[precision]]["GFLOP/s"] * 1e9
    read = floor.extra[COPY]["GB/s"] * 1e9
    size = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    return max(work.operations / rate, work.weights * size / read)


def work_of(artifact: Path, manifest: ArtifactManifest, size: Size, batch: int) -> dict[str, Work]:
    """stage -> its work at a size and batch, counted on the graphs as OpenVINO reads them; none where it is not installed."""
    try:
        import openvino
    except ImportError:
        return {}
    core: Any = openvino.Core()
    found = {}
    for stage in STAGES:
        name = manifest.graph_name(stage, size)
        if name not in manifest.graphs:
            raise ImagineFlashError(f"{artifact} has no graph {name!r}; export it with its stages")
        spec = manifest.graphs[name]
        model = core.read_model(artifact / spec.file)
        model.reshape({value.name: list(value.at(batch, size)) for value in spec.inputs})
        operators = model.get_ordered_ops()
        weights = sum(prod(o.output(0).shape) for o in operators if o.get_type_name() == "Constant")
        found[stage] = Work(operations=sum(map(_operations, operators)), weights=weights)
    return found


def _operations(operator: Any) -> float:
    """Multiplications and additions of a convolution, a product of matrices or an attention; others are not counted."""
    kind = operator.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention"):
        return 0.0
    first, second, out = (list(port.get_shape()) for port in (operator.input(0), operator.input(1), operator.output(0)))
    if kind == "Convolution":  # weights (out, in, h, w)
        return 2.0 * prod(out) * prod(second[1:])
    if kind == "GroupConvolution":  # (groups, out / groups, in / groups, h, w)
        return 2.0 * prod(out) * prod(second[2:])
    if kind == "MatMul":
        return 2.0 * prod(out) * first[-2 if operator.get_attributes()["transpose_a"] else -1]
    return 2.0 * prod(out[:-1]) * second[-2] * (first[-1] + out[-1])  # q k^T, then with v
