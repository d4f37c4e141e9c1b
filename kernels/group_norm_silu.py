"""GroupNorm and, where it follows, SiLU in two launches, as a drop-in for diffusers' blocks.

Traffic per value: read twice, written once; 6 bytes at half precision, where torch reads and writes it 10 (statistics, affine,
SiLU). The second read mostly hits the L2 cache. Bound by memory. Statistics are float32: each program takes the mean of its
chunk and the squares around that mean, and chunks are joined by the formula of Chan et al. (1979); no atomics, so the
result does not change from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .triton_or_reference import jit, memory_format_of, programs, runs_kernel, tl

BLOCK, WARPS, MAX_CHUNKS = 4096, 8, 1024
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@jit()
def _places(
    chunk,
    image,
    first,
    channels,
    pixels,
    GROUP_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the values of a chunk of a group lie, the channel of each within the group, and which of them exist."""
    if PLANES:  # NCHW: a group is one run of GROUP_CHANNELS * pixels values
        offset = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        place = (image * channels + first) * pixels + offset
        channel = offset // pixels
        inside = offset < GROUP_CHANNELS * pixels
    else:
        pixel = chunk.to(tl.int64) * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)[:, None]
        channel = tl.arange(0, WIDTH)[None, :]
        place = (image * pixels + pixel) * channels + first + channel
        inside = (pixel < pixels) & (channel < GROUP_CHANNELS)
    return place, channel, inside


@jit(do_not_specialize=("chunks",))
def statistics_kernel(
    x_ptr,
    partial_ptr,
    channels,
    pixels,
    chunks,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, group = program % chunks, program // chunks
    image, first = (group // GROUPS).to(tl.int64), (group % GROUPS) * GROUP_CHANNELS
    place, _, inside = _places(chunk, image, first, channels, pixels, GROUP_CHANNELS, WIDTH, PLANES, BLOCK)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.sum(inside.to(tl.float32))
    mean = tl.sum(x) / count  # type: ignore[operator]
    away = tl.where(inside, x - mean, 0.0)
    tl.store(partial_ptr + program * 3, count)
    tl.store(partial_ptr + program * 3 + 1, mean)
    tl.store(partial_ptr + program * 3 + 2, tl.sum(away * away))


@jit(do_not_specialize=("chunks",))
def normalise_kernel(
    x_ptr,
    partial_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    channels,
    pixels,
    chunks,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    SILU: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, group = program % chunks, program // chunks
    image, first = (group // GROUPS).to(tl.int64), (group % GROUPS) * GROUP_CHANNELS

    each = tl.arange(0, CHUNKS)
    partial = partial_ptr + (group.to(tl.int64) * chunks + each) * 3
    counts = tl.load(partial, mask=each < chunks, other=0.0)
    means = tl.load(partial + 1, mask=each < chunks, other=0.0)
    squares = tl.load(partial + 2, mask=each < chunks, other=0.0)
    count = tl.sum(counts)
    mean = tl.sum(counts * means) / count  # type: ignore[operator]
    away = means - mean
    variance = tl.sum(squares + counts * away * away) / count  # type: ignore[operator]
    scale = 1.0 / tl.sqrt(variance + eps)

    place, channel, inside = _places(chunk, image, first, channels, pixels, GROUP_CHANNELS, WIDTH, PLANES, BLOCK)
    y = (tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean) * scale
    if weight_ptr is not None:
        known = channel < GROUP_CHANNELS
        y *= tl.load(weight_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
        y += tl.load(bias_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def chunks_of(channels: int, pixels: int, groups: int, planes: bool) -> tuple[int, int, int]:
    """(chunks per group, width, block): width is the power of two that holds a group's channels of one pixel."""
    size = channels // groups
    width = 1 << (size - 1).bit_length()
    block = max(BLOCK, width)
    length, step = (size * pixels, block) if planes else (pixels, block // width)
    while -(-length // step) > MAX_CHUNKS:
        block, step = 2 * block, 2 * step
    return -(-length // step), width, block


def launch(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, out: Tensor
) -> None:
    """Start both kernels on a checked, dense x (B, C, ...) and an out of its layout."""
    batch, channels = x.shape[:2]
    pixels, planes = x[0, 0].numel(), x.is_contiguous()
    chunks, width, block = chunks_of(channels, pixels, groups, planes)
    partial = torch.empty(batch * groups * chunks, 3, dtype=torch.float32, device=x.device)
    grid = (programs(batch * groups, chunks, 1),)
    sizes = {
        "GROUPS": groups,
        "GROUP_CHANNELS": channels // groups,
        "WIDTH": width,
        "PLANES": planes,
        "BLOCK": block,
        "num_warps": WARPS,
    }
    statistics_kernel[grid](x, partial, channels, pixels, chunks, **sizes)
    normalise_kernel[grid](
        x,
        partial,
        weight,
        bias,
        out,
        eps,
        channels,
        pixels,
        chunks,
        SILU=silu,
        CHUNKS=1 << (chunks - 1).bit_length(),
        **sizes,
    )


def reference(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """torch's GroupNorm and SiLU."""
    y = functional.group_norm(x, groups, weight, bias, eps)
    return functional.silu(y) if silu else y


def run(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """The kernels where they can run, else the reference, on checked tensors."""
    if not runs_kernel(x):
        return reference(x, groups, weight, bias, eps, silu)
    x = x if memory_format_of(x) else x.contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton starts on the current device, which may be another one
        launch(x, groups, weight, bias, eps, silu, out)
    return out


# what torch.compile sees; group_norm_silu is what to call
group_norm_op = torch.library.custom_op("imagine_flash::group_norm", run, mutates_args=())


@group_norm_op.register_fake
def _(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x) if memory_format_of(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """GroupNorm (Wu & He 2018) over `groups` groups of channels, then y * sigmoid(y) unless `silu` is False.

    Args:
        x: (B, C, ...) float32, float16 or bfloat16; contiguous or channels_last (another layout is copied).
        weight, bias: (C,), both or none.
    Returns:
        A new tensor of x's dtype and layout.
    Raises:
        ValueError: for shapes, devices or dtypes that do not fit, before anything is started.
    """
    if x.ndim < 2 or x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, float16 or bfloat16 (B, C, ...), got {x.dtype} {tuple(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels do not divide into {groups} groups")
    if (weight is None) != (bias is None):
        raise ValueError("give weight and bias, or neither")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and (values.shape != x.shape[1:2] or values.device != x.device):
            raise ValueError(
                f"{name} must be ({x.shape[1]},) on {x.device}, got {tuple(values.shape)} on {values.device}"
            )
    if not x.numel():
        return torch.empty_like(x)
    start = group_norm_op if torch.compiler.is_compiling() else run  # an op's own dispatch costs more than a launch
    return start(x, groups, weight, bias, eps, silu)


class FusedGroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm on the kernel: same parameters, same state dict. Without gradients only; with them, torch's."""

    fused_silu = False

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (input.requires_grad or (self.affine and self.weight.requires_grad)):
            return reference(input, self.num_groups, self.weight, self.bias, self.eps, self.fused_silu)
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, eps=self.eps, silu=self.fused_silu)


class FusedGroupNormSiLU(FusedGroupNorm):
    """The same with the SiLU that follows it."""

    fused_silu = True


class SiLUOfVectors(nn.SiLU):
    """What is left of a ResnetBlock2D's SiLU: that of the time embedding (B, C); its norms bring their own for pictures."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.ndim == 2 else input


def apply(module: Any) -> int:
    """Put the kernel in place of every GroupNorm in `module`, with the SiLU that diffusers runs after it; how many norms.

    Known pairs: norm1 and norm2 of ResnetBlock2D, conv_norm_out and conv_act of UNets and decoders. State dicts do not change.
    """
    swapped = 0
    for part in list(module.modules()):
        for norms, act in (("norm1", "norm2"), "nonlinearity"), (("conv_norm_out",), "conv_act"):
            found = [getattr(part, name, None) for name in norms]
            plain = getattr(part, "time_embedding_norm", "default") == "default"
            if plain and type(getattr(part, act, None)) is nn.SiLU and all(type(n) is nn.GroupNorm for n in found):
                for norm in found:
                    norm.__class__ = FusedGroupNormSiLU  # type: ignore[union-attr]
                setattr(part, act, SiLUOfVectors() if act == "nonlinearity" else nn.Identity())
                swapped += len(found)
    for part in module.modules():
        if type(part) is nn.GroupNorm:
            part.__class__ = FusedGroupNorm
            swapped += 1
    return swapped


def restore(module: Any) -> int:
    """Undo `apply`; how many norms are torch's again."""
    restored = 0
    for part in list(module.modules()):
        for norm, act in ("norm1", "nonlinearity"), ("conv_norm_out", "conv_act"):
            if type(getattr(part, norm, None)) is FusedGroupNormSiLU:
                setattr(part, act, nn.SiLU())
    for part in module.modules():
        if isinstance(part, FusedGroupNorm):
            part.__class__ = nn.GroupNorm  # type: ignore[assignment]
            restored += 1
    return restored
