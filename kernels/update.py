"""The noise-corrected update x_s = A x_t + B m + C z of core/update.py as one kernel.

Traffic per element: x_t and m are read once (with guidance m_u too, with given noise z too), x_s is written once and, where
asked for, its cast for the next network call. At float32 state and bf16 network: 4 + 2 read, 4 + 2 written = 12 bytes, for
about ten floating-point operations: bound by memory at every size, and by the launch at one latent of 4x64x64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ScheduleError
from ..core.update import UpdateTable
from .triton_or_reference import jit, memory_format_of, programs, runs_kernel, tl

BLOCK, WARPS = 1024, 4
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The rows (A, B, C) of one or more plans on a device.

    rows: float32 (R, 3); positions: int32 (R,), 0..R-1, of which a one-element view says "this step for every image"
    without a copy; renoises: per row, whether it needs noise; starts: the row at which each plan begins.
    """

    rows: Tensor
    positions: Tensor
    renoises: tuple[bool, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.renoises)


def coefficients_on(device: torch.device | str, *tables: UpdateTable) -> Coefficients:
    """Put the tables of one or more plans on `device`, one after the other. ScheduleError for NaN or infinite values."""
    if not tables:
        raise ScheduleError("no update table given: make one with core.update.update_table")
    rows = np.concatenate([np.stack([t.a, t.b, t.c], axis=1) for t in tables]).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ScheduleError(
            f"row {bad[0]} of the update table is {rows[bad[0]].tolist()}: this step has no closed form"
        )
    lengths = [len(t) for t in tables]
    return Coefficients(
        rows=torch.from_numpy(rows).to(device),
        positions=torch.arange(len(rows), dtype=torch.int32, device=device),
        renoises=tuple(bool(c) for c in rows[:, 2] != 0),
        starts=tuple(int(s) for s in np.cumsum([0, *lengths[:-1]])),
    )


@jit(do_not_specialize=("index_ptr", "index_stride", "table_rows", "blocks_per_row"))
def update_kernel(
    x_ptr,
    m_ptr,
    uncond_ptr,
    noise_ptr,
    guidance_ptr,
    table_ptr,
    index_ptr,
    out_ptr,
    next_ptr,
    guidance,
    scale,
    row_elements,
    blocks_per_row,
    index_stride,
    table_rows,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks_per_row
    offset = (program % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < row_elements
    place = row.to(tl.int64) * row_elements + offset

    index = tl.load(index_ptr + row * index_stride).to(tl.int64)
    known = (index >= 0) & (index < table_rows)  # another index gives NaN, never another step
    a = tl.load(table_ptr + index * 3, mask=known, other=float("nan"))
    b = tl.load(table_ptr + index * 3 + 1, mask=known, other=float("nan"))

    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + place, mask=inside, other=0.0).to(tl.float32)
        weight = guidance
        if guidance_ptr is not None:
            weight = tl.load(guidance_ptr + row).to(tl.float32)
        m = uncond + weight * (m - uncond)
    x_s = a * x + b * m
    if noise_ptr is not None:
        c = tl.load(table_ptr + index * 3 + 2, mask=known, other=float("nan"))
        x_s += c * tl.load(noise_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, x_s.to(out_ptr.dtype.element_ty), mask=inside)
    if next_ptr is not None:
        tl.store(next_ptr + place, (x_s * scale).to(next_ptr.dtype.element_ty), mask=inside)


def reference(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    step_index: Tensor,
    *,
    uncond: Tensor | None = None,
    guidance: Tensor | float | None = None,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """core.update.reference_update in torch, computed and returned in `dtype`; in float64 it is the oracle of the tests."""

    def per_image(values: Tensor) -> Tensor:
        return values.to(dtype).view(-1, *(1,) * (x.ndim - 1))

    a, b, c = (per_image(column) for column in rows[step_index.long()].unbind(1))
    m = m.to(dtype)
    if uncond is not None:
        weight = per_image(guidance) if isinstance(guidance, Tensor) else float(guidance or 0.0)
        m = uncond.to(dtype) + weight * (m - uncond.to(dtype))
    x_s = a * x.to(dtype) + b * m
    return x_s if noise is None else x_s + c * noise.to(dtype)


def run(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    step_index: Tensor,
    out: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | None,
    guidance_scale: float,
    noise: Tensor | None,
    network_input: Tensor | None,
    scale: float,
) -> None:
    """The kernel where it can run, else the reference, on checked tensors."""
    if runs_kernel(x):
        row_elements = x.numel() // x.shape[0]
        with torch.cuda.device_of(x):  # Triton starts on the current device, which may be another one
            update_kernel[(programs(x.shape[0], row_elements, BLOCK),)](
                x,
                m,
                uncond,
                noise,
                guidance,
                rows,
                step_index,
                out,
                network_input,
                guidance_scale,
                scale,
                row_elements,
                -(-row_elements // BLOCK),
                int(step_index.numel() > 1),
                rows.shape[0],
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        return
    weight = guidance_scale if guidance is None else guidance
    x_s = reference(x, m, rows, step_index, uncond=uncond, guidance=weight, noise=noise)
    out.copy_(x_s)
    if network_input is not None:
        network_input.copy_(x_s * scale)


# what torch.compile sees; noise_corrected_update is what to call
update_op = torch.library.custom_op("imagine_flash::update", run, mutates_args=("out", "network_input"))
update_op.register_fake(lambda *arguments: None)


def noise_corrected_update(
    x: Tensor,
    m: Tensor,
    coefficients: Coefficients,
    step_index: int | Sequence[int] | Tensor,
    *,
    uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
    network_input: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x_s = A x + B m + C z, the rows of the table chosen per image (Kohler et al. 2024, noise correction).

    Args:
        x: x_t (B, ...), float32, float16 or bfloat16; NCHW, channels_last or any contiguous shape.
        m: the network's output, of x's shape; with `uncond` m = uncond + guidance (m - uncond).
        coefficients: of `coefficients_on`, on x's device.
        step_index: the row of every image, or ints (B,). Those on a GPU are not read back: a wrong one gives NaN pictures.
        guidance: a number, or float32 (B,).
        noise: z of x's shape, for rows that re-noise.
        out: where x_s goes, of x's shape; may be x itself. By default a new float32 tensor.
        network_input: if given, x_s times `scale` is written there too, in its dtype.
        scale: for example 1 / scaling_factor of the decoder.
    Returns:
        out.
    Raises:
        ValueError: for shapes, devices, dtypes, layouts or indices that do not fit, before anything is started.
    """
    index = _index(x, coefficients, step_index, noise is not None)
    layout = _check(x, m, out, uncond, guidance, noise, network_input)
    if out is None:
        out = torch.empty_like(x, dtype=torch.float32, memory_format=layout)
    if x.numel() == 0:
        return out
    x, m = x.contiguous(memory_format=layout), m.contiguous(memory_format=layout)
    if uncond is not None:
        uncond = uncond.contiguous(memory_format=layout)
    if noise is not None:
        noise = noise.contiguous(memory_format=layout)
    weights = guidance if isinstance(guidance, Tensor) else None
    weight = 0.0 if guidance is None or weights is not None else float(guidance)
    start = update_op if torch.compiler.is_compiling() else run  # an op's own dispatch costs more than a launch
    start(x, m, coefficients.rows, index, out, uncond, weights, weight, noise, network_input, float(scale))
    return out


def _index(x: Tensor, coefficients: Coefficients, step_index: int | Sequence[int] | Tensor, has_noise: bool) -> Tensor:
    """int32 or int64 (1,) or (B,) on x's device, checked as far as the host knows it."""
    if coefficients.rows.device != x.device:
        raise ValueError(f"the coefficients are on {coefficients.rows.device}, x is on {x.device}; make them there")
    if isinstance(step_index, Tensor) and step_index.device.type != "cpu":
        asked: Sequence[int] = range(len(coefficients))  # not read back: it may be any row
        if step_index.dtype not in (torch.int32, torch.int64) or step_index.device != x.device:
            raise ValueError(f"step_index must be int32 or int64 on {x.device}, got {step_index.dtype}")
    else:
        asked = [step_index] if isinstance(step_index, int) else [int(i) for i in step_index]
    if not isinstance(step_index, int) and len(step_index) != x.shape[0]:
        raise ValueError(f"step_index has {len(step_index)} values, x has {x.shape[0]} images")
    for i in asked:
        if not 0 <= i < len(coefficients):
            raise ValueError(f"step_index {i} is outside the table's rows 0..{len(coefficients) - 1}")
    if not has_noise and any(coefficients.renoises[i] for i in asked):
        raise ValueError("this table re-noises: give noise of the shape of x")
    if isinstance(step_index, int):
        return coefficients.positions[step_index : step_index + 1]
    return step_index if isinstance(step_index, Tensor) and step_index.is_cuda else torch.tensor(asked, device=x.device)


def _check(
    x: Tensor,
    m: Tensor,
    out: Tensor | None,
    uncond: Tensor | None,
    guidance: float | Tensor | None,
    noise: Tensor | None,
    network_input: Tensor | None,
) -> torch.memory_format:
    """The layout in which all of them are read and written. ValueError names the two things that do not fit."""
    if (uncond is None) != (guidance is None):
        raise ValueError("guidance needs both uncond and guidance")
    named = {"x": x, "m": m, "uncond": uncond, "noise": noise, "out": out, "network_input": network_input}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, x has {tuple(x.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {tensor.dtype}; known: float32, float16, bfloat16")
    if x.ndim == 0:
        raise ValueError("x must have a batch axis, got a scalar")
    if isinstance(guidance, Tensor) and (
        guidance.shape != x.shape[:1] or guidance.dtype != torch.float32 or guidance.device != x.device
    ):
        raise ValueError(
            f"guidance must be float32 ({x.shape[0]},) on {x.device}, "
            f"got {str(guidance.dtype)[6:]} {tuple(guidance.shape)} on {guidance.device}"
        )
    return _layout(x, {"out": out, "network_input": network_input})


def _layout(x: Tensor, written: dict[str, Tensor | None]) -> torch.memory_format:
    """That of what is written, else of x, else contiguous."""
    layout = None
    for name, tensor in written.items():
        if tensor is None:
            continue
        if memory_format_of(tensor) is None:
            raise ValueError(f"{name} has strides {tensor.stride()}: it must be contiguous or channels_last")
        if layout is not None and not tensor.is_contiguous(memory_format=layout):
            raise ValueError(f"{name} has strides {tensor.stride()}: it must have the layout of out, {layout}")
        layout = layout or memory_format_of(tensor)
    return layout or memory_format_of(x) or torch.contiguous_format
