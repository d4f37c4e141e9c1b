"""`bench kernels`: each kernel against what users run instead, on this machine's device.

On a GPU the kernels run; on a CPU their references do, and the record says which. Times come from the harness, interleaved; on a
GPU `triton.testing.do_bench`, which empties the L2 cache before each run, adds the device's own time of what can be captured as a
CUDA graph: launched one by one, short kernels are timed by their launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..core.errors import ImagineFlashError
from ..core.plan import StepPlan
from ..core.schedule import NoiseSchedule
from ..core.update import update_table
from ..kernels import group_norm_silu as norm
from ..kernels import to_image as image
from ..kernels import update
from ..kernels.triton_or_reference import triton
from .clocks import clock_for
from .harness import Candidate, measure
from .random_students import BETAS
from .records import save
from .schema import Case, Check, Record, compare, new_record

SD_CONFIG = {**BETAS, "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
FUSED, COMPILED, COPY = "ours", "torch.compile", "copy"
CAPTURED, COPY_CAPTURED = "ours, CUDA graph", "copy, CUDA graph"
DDIM, EAGER = "diffusers DDIM step", "torch eager"
Runs = dict[str, Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kernel at one shape: the ways to do it, what each wrote, and the bytes that must move at least."""

    case: dict[str, Any]
    baseline: str
    runs: Runs
    written: Callable[[str], Tensor]  # by a candidate that ran
    outputs: tuple[Tensor, ...]  # emptied before a candidate is checked
    expected: Tensor
    tolerance: float
    bytes_moved: int


def bench_kernels(
    out: Path,
    *,
    device: str | None = None,
    rounds: int = 50,
    quick: bool = False,
    until: float = float("inf"),
    console: Console | None = None,
) -> Record:
    """Check and time every kernel, write `out`.json and `out`.png after each row, return the record. until: no further row begins
    at this time of the monotonic clock, but one is measured. console: for the progress bar, by default standard error.
    ImagineFlashError for a wrong result."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clock = clock_for(device)
    refuse_interpreter()
    workloads = list(_workloads(device, quick))
    where = "as kernels on a GPU" if device != "cpu" else "by their references, which are what a CPU runs"
    rows, record = list[Case](), None
    for build in track(workloads, f"kernels on {device}", console=console or Console(stderr=True)):
        if record is None or time.monotonic() < until:
            rows.append(_measure(build(), device, rounds, clock))
            question = f"How fast are the fused update, to_image and GroupNorm + SiLU, {where}?"
            save(record := new_record(question, rows, device=device), out)
    assert record is not None
    return record


def refuse_interpreter() -> None:
    """Raises ImagineFlashError where the kernels would run in Triton's interpreter."""
    if triton is not None and triton.knobs.runtime.interpret:
        raise ImagineFlashError("TRITON_INTERPRET is set: this would time Triton's interpreter; unset it")


def _measure(work: Workload, device: str, rounds: int, clock: Any) -> Case:
    source = torch.arange(max(1, work.bytes_moved // 2), device=device).to(torch.uint8)
    target = torch.zeros_like(source)
    work.runs[COPY] = lambda: target.copy_(source)
    if device != "cpu":
        work.runs[COPY_CAPTURED] = captured(work.runs[COPY])

    def check(candidate: Candidate) -> Check:
        for output in (target, *work.outputs):
            output.zero_()
        candidate.run()
        copies = candidate.name in (COPY, COPY_CAPTURED)
        found, wanted = (target, source) if copies else (work.written(candidate.name), work.expected)
        return compare("largest difference from float64", _largest_difference(found, wanted), 0.0, work.tolerance)

    candidates = [Candidate(name=name, run=run) for name, run in work.runs.items()]
    case = measure(candidates, baseline=work.baseline, check=check, case=work.case, warm_up=5, n=rounds, clock=clock)
    return case.with_extra(_bandwidth(case, work, device))


def _largest_difference(found: Tensor, wanted: Tensor) -> float:
    """In float64, on their device; infinite where the shapes differ, NaN where a value is."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted).abs().max())


def _bandwidth(case: Case, work: Workload, device: str) -> dict[str, dict[str, float]]:
    """Bytes moved, the device's own time, and the share of the bandwidth of a copy of as many bytes: on a GPU by the device's
    times, where a candidate has one, else in the same rounds."""
    alone = (
        {name: time for name, run in work.runs.items() if (time := _device_time(name, run))} if device != "cpu" else {}
    )
    times = {t.name: (t.p50_us,) for t in case.timings} if device == "cpu" else alone
    extra: dict[str, dict[str, float]] = {}
    for name in work.runs:
        extra[name] = {"MB moved": work.bytes_moved / 1e6}
        if name in times:
            extra[name]["% of copy bandwidth"] = round(100 * times[COPY][0] / times[name][0], 1)
        for label, value in zip(("device p50 µs", "device p20 µs", "device p80 µs"), alone.get(name, ())):  # noqa: B905
            extra[name][label] = round(value, 3)
    return extra


def _device_time(name: str, run: Callable[[], Any]) -> tuple[float, float, float] | None:
    """Microseconds p50, p20, p80 of a CUDA graph of it with a cold L2 cache; None of diffusers' step, which asks the host."""
    from triton.testing import do_bench

    if name == DDIM:
        return None
    replay = run if name in (CAPTURED, COPY_CAPTURED) else captured(run)
    times: Any = do_bench(replay, quantiles=[0.5, 0.2, 0.8])
    p50, p20, p80 = times
    return 1e3 * p50, 1e3 * p20, 1e3 * p80


# channels, side: Stable Diffusion's UNet at 512x512, SDXL's at 1024x1024, and the decoder's at 512x512 and 1024x1024
NORMS = (
    *((320, 64), (640, 32), (1280, 16), (1280, 8), (1920, 16), (960, 64)),
    *((320, 128), (640, 64), (1280, 32), (1920, 64)),
    *((512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 1024), (128, 512)),
)


def _workloads(device: str, quick: bool) -> Iterator[Callable[[], Workload]]:
    """The kernels in turn, so that each has rows when the time is over."""
    network = torch.float32 if device == "cpu" else torch.bfloat16  # a CPU's networks run in float32 here
    latents = [(1, 64), (8, 64), (64, 64), (1, 128), (8, 128), (64, 128), (256 if device == "cpu" else 1024, 128)]
    pictures, norms = [(1, 512), (1, 1024), (8, 1024)], NORMS[-1:] if device == "cpu" else NORMS
    if quick:
        latents, pictures, norms = latents[:1], [(1, 64)], [(NORMS[-1][0], 32)]
    shapes = {_update: latents, _to_image: pictures, _group_norm: norms}
    for turn in zip_longest(
        *([partial(make, *shape, device, network) for shape in own] for make, own in shapes.items())
    ):
        yield from (build for build in turn if build is not None)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the shapes of its first call, each workload's anew: beyond eight torch would run it eagerly."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` in a CUDA graph, warmed up on a side stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device, dtype)


def _update(batch: int, side: int, device: str, network: torch.dtype) -> Workload:
    """A step of a three-step plan at its middle, with the cast for the next call; noise correction is off, as in DDIM."""
    x, m = _draw(batch, 4, side, side, device=device), _draw(batch, 4, side, side, device=device, dtype=network)
    scheduler: Any = DDIMScheduler.from_config(SD_CONFIG)
    scheduler.set_timesteps(3, device=device)
    plan, schedule = StepPlan.trailing(3), NoiseSchedule.from_scheduler_config(SD_CONFIG)
    table = update_table(schedule, plan, "v_prediction", noise_correction=False)
    rows, t = update.coefficients_on(device, table), plan.timesteps[1]  # where DDIM's step ends at 333 too
    following, state = torch.empty_like(m), torch.empty_like(x)

    def ddim() -> None:
        following.copy_(scheduler.step(m, t, x, eta=0.0, return_dict=False)[0])

    def eager() -> None:
        x_s = update.reference(x, m, rows.rows, rows.positions[1:2])
        state.copy_(x_s)
        following.copy_(x_s)

    runs: Runs = {
        DDIM: ddim,
        EAGER: eager,
        COMPILED: _compiled(eager),
        FUSED: lambda: update.noise_corrected_update(x, m, rows, 1, out=state, network_input=following),
    }
    moved = x.nbytes + m.nbytes + state.nbytes + following.nbytes
    expected = update.reference(x, m, rows.rows.double(), rows.positions[1:2], dtype=torch.float64)
    if device != "cpu":
        runs[CAPTURED] = captured(runs[FUSED])
    return Workload(
        case={"kernel": "update", "latents": (batch, 4, side, side)},
        baseline=DDIM,
        runs=runs,
        expected=expected,
        outputs=(following, state),
        written=lambda name: following,
        bytes_moved=moved,
        tolerance=1e-5 if network is torch.float32 else 0.05,
    )


def _to_image(batch: int, side: int, device: str, network: torch.dtype) -> Workload:
    x = _draw(batch, 3, side, side, device=device, dtype=network)
    out = torch.empty(batch, side, side, 3, dtype=torch.uint8, device=device)

    def eager() -> None:
        out.copy_(((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1))  # diffusers' VaeImageProcessor

    runs: Runs = {EAGER: eager, COMPILED: _compiled(eager), FUSED: lambda: image.to_image(x, out=out)}
    expected = (x.double() * 127.5 + 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
    moved = x.nbytes + out.nbytes
    if device != "cpu":
        runs[CAPTURED] = captured(runs[FUSED])
    return Workload(
        case={"kernel": "to_image", "pictures": (batch, 3, side, side)},
        baseline=EAGER,
        runs=runs,
        expected=expected,
        outputs=(out,),
        written=lambda name: out,
        tolerance=1.0,
        bytes_moved=moved,
    )


def _group_norm(channels: int, side: int, device: str, network: torch.dtype) -> Workload:
    """A norm of a UNet or decoder in 32 groups, channels_last.

    Allowed is 128 times float32's rounding of the largest value, for a sum over up to a million of them; bfloat16's once.
    """
    x = _draw(1, channels, side, side, device=device, dtype=network).contiguous(memory_format=torch.channels_last)
    weight, bias = (_draw(channels, device=device, dtype=network) for _ in range(2))
    kept: dict[str, Tensor] = {}

    def keep(name: str, function: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: kept.update({name: function(x, 32, weight, bias, 1e-6, True)})

    def ours(*arguments: Any) -> Tensor:
        return norm.group_norm_silu(*arguments[:4], eps=1e-6)

    runs: Runs = {
        EAGER: keep(EAGER, norm.reference),
        COMPILED: keep(COMPILED, _compiled(norm.reference)),
        FUSED: keep(FUSED, ours),
    }
    expected = norm.reference(x.double(), 32, weight.double(), bias.double(), 1e-6, True)
    moved = 2 * x.nbytes
    if device != "cpu":
        runs[CAPTURED] = captured(keep(CAPTURED, ours))
    return Workload(
        case={"kernel": "group_norm_silu", "input": (1, channels, side, side), "channels_last": True},
        baseline=EAGER,
        runs=runs,
        expected=expected,
        outputs=(),
        written=kept.__getitem__,
        tolerance=float(expected.abs().max()) * (2**-16 if network is torch.float32 else 2**-7),
        bytes_moved=moved,
    )
