"""The decoder's output to pixels: [-1, 1] to uint8 in height, width, channel order, in one pass.

Traffic per value: 2 bytes read (half precision), 1 written; the copy to the host is then 3 bytes a pixel instead of 6 or 12.
Bound by memory. In channels_last the pass is a plain stream; from NCHW three streams are read and one is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_or_reference import jit, memory_format_of, programs, runs_kernel, tl

BLOCK, WARPS = 2048, 4
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@jit(do_not_specialize=("blocks_per_image",))
def to_image_kernel(
    x_ptr, out_ptr, image_elements, blocks_per_image, CHANNELS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    image = (program // blocks_per_image).to(tl.int64)
    offset = (program % blocks_per_image).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < image_elements
    source = offset
    if PLANES:  # NCHW: the value of channel c at pixel p lies at c * pixels + p
        source = (offset % CHANNELS) * (image_elements // CHANNELS) + offset // CHANNELS
    value = tl.load(x_ptr + image * image_elements + source, mask=inside, other=0.0).to(tl.float32)
    level = tl.minimum(tl.maximum(value * 127.5 + 127.5, 0.0), 255.0)
    level = (level + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds a float32 half to even, as torch.round does
    level = tl.where(value == value, level, 0.0)  # NaN has no level: black, as it is on every device then
    tl.store(out_ptr + image * image_elements + offset, level.to(tl.uint8), mask=inside)


def reference(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C) uint8 in torch, computed in float32."""
    levels = (x.float() * 127.5 + 127.5).nan_to_num(0.0).clamp(0, 255).round()
    return levels.permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def launch(x: Tensor, out: Tensor) -> None:
    """Start the kernel on a checked, dense x and a contiguous out."""
    image_elements = x[0].numel()
    to_image_kernel[(programs(x.shape[0], image_elements, BLOCK),)](
        x,
        out,
        image_elements,
        -(-image_elements // BLOCK),
        CHANNELS=x.shape[1],
        PLANES=x.is_contiguous(),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def run(x: Tensor, out: Tensor) -> None:
    """The kernel where it can run, else the reference, on checked tensors."""
    if runs_kernel(x):
        with torch.cuda.device_of(x):  # Triton starts on the current device, which may be another one
            launch(x, out)
    else:
        out.copy_(reference(x))


# what torch.compile sees; to_image is what to call
to_image_op = torch.library.custom_op("imagine_flash::to_image", run, mutates_args=("out",))
to_image_op.register_fake(lambda *arguments: None)


def to_image(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Pixels of pictures: round(127.5 x + 127.5), half to even, cut to 0..255; NaN becomes 0.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16 in about [-1, 1], NCHW or channels_last.
        out: contiguous uint8 (B, H, W, C) on x's device; by default a new tensor.
    Returns:
        out.
    Raises:
        ValueError: for shapes, devices, dtypes or layouts that do not fit, before anything is started.
    """
    if x.ndim != 4 or x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, float16 or bfloat16 (B, C, H, W), got {x.dtype} {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    shape = (batch, height, width, channels)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=x.device)
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, x of {tuple(x.shape)} needs {shape}")
    if out.dtype != torch.uint8 or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous uint8 on {x.device}, got {out.dtype} on {out.device}, strides {out.stride()}"
        )
    if x.numel():
        start = to_image_op if torch.compiler.is_compiling() else run  # an op's own dispatch costs more than a launch
        start(x if memory_format_of(x) else x.contiguous(), out)
    return out
