"""GroupNorm and, where it follows, SiLU, for channels_last, as a drop-in for diffusers' blocks.

Traffic per value: read twice, written once: 6 bytes at half precision, where torch's CUDA kernels work on NCHW and copy the
layout before and after. Bound by memory: two reads and a write allow two thirds of a copy's rate. Three launches:

- statistics: tiles of whole rows of channels, read 128 bits at a time; per channel the sum and the sum of squares of what
  is above the image's first value of that channel. That shift keeps a large mean from cancelling.
- finalise: one program per group joins the channels' sums (Chan et al. 1979), and folds mean, deviation, weight and bias
  into one multiply-add per channel.
- normalise: reads again, mostly from the L2 cache, one multiply-add and SiLU per value.

Sums are float32, joined in a fixed order without atomics, so the result does not change from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .triton_or_reference import jit, programs, runs_kernel, tl

TILE, WARPS, MAX_WIDTH = 2048, 4, 512
PROGRAMS = 1024  # of the statistics, about: enough for every GPU, few enough to be joined by one program per group
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@jit(do_not_specialize=("pixels", "splits", "tiles"))
def statistics_kernel(
    x_ptr, sum_ptr, square_ptr, pixels, splits, tiles, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    program, column = tl.program_id(0), tl.program_id(1)
    image = (program // splits).to(tl.int64)
    channel = column * WIDTH + tl.arange(0, WIDTH)
    known = channel < CHANNELS
    x_ptr += image * pixels * CHANNELS
    shift = tl.load(x_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    first = (program % splits).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        pixel = first + tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (pixel < pixels) & known[None, :]
        x = tl.load(x_ptr + pixel * CHANNELS + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        above = tl.where(inside, x - shift, 0.0)
        total += above
        squares += above * above
    place = program.to(tl.int64) * CHANNELS + channel
    tl.store(sum_ptr + place, tl.sum(total, 0), mask=known)
    tl.store(square_ptr + place, tl.sum(squares, 0), mask=known)


@jit(do_not_specialize=("pixels", "splits", "eps"))
def finalise_kernel(
    x_ptr,
    sum_ptr,
    square_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    offset_ptr,
    eps,
    pixels,
    splits,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // GROUPS).to(tl.int64)
    own = tl.arange(0, WIDTH)
    known = own < GROUP_CHANNELS
    channel = (program % GROUPS) * GROUP_CHANNELS + own
    channels = GROUPS * GROUP_CHANNELS
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)[:, None]
        place = (image * splits + split) * channels + channel[None, :]
        inside = (split < splits) & known[None, :]
        total += tl.load(sum_ptr + place, mask=inside, other=0.0)
        squares += tl.load(square_ptr + place, mask=inside, other=0.0)
    above = tl.sum(total, 0) / pixels  # the mean of each channel, less its shift
    shift = tl.load(x_ptr + image * pixels * channels + channel, mask=known, other=0.0).to(tl.float32)
    first = tl.sum(tl.where(own == 0, shift, 0.0))  # one shift for the group, so that means are joined near nought
    means = tl.where(known, shift - first + above, 0.0)
    mean = tl.sum(means) / GROUP_CHANNELS
    away = tl.where(known, means - mean, 0.0)
    within = tl.where(known, tl.sum(squares, 0) / pixels - above * above, 0.0)
    variance = tl.maximum(tl.sum(within + away * away) / GROUP_CHANNELS, 0.0)
    scale = 1.0 / tl.sqrt(variance + eps)
    offset = -(mean + first) * scale
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
        scale, offset = scale * weight, offset * weight + bias
    else:
        scale, offset = scale + 0.0 * own, offset + 0.0 * own
    place = image * channels + channel
    tl.store(scale_ptr + place, scale, mask=known)
    tl.store(offset_ptr + place, offset, mask=known)


@jit(do_not_specialize=("pixels", "tiles_per_image"))
def normalise_kernel(
    x_ptr,
    scale_ptr,
    offset_ptr,
    out_ptr,
    pixels,
    tiles_per_image,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    program, column = tl.program_id(0), tl.program_id(1)
    image = (program // tiles_per_image).to(tl.int64)
    channel = column * WIDTH + tl.arange(0, WIDTH)
    known = channel < CHANNELS
    scale = tl.load(scale_ptr + image * CHANNELS + channel, mask=known, other=0.0)[None, :]
    offset = tl.load(offset_ptr + image * CHANNELS + channel, mask=known, other=0.0)[None, :]
    pixel = (program % tiles_per_image).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (pixel < pixels) & known[None, :]
    place = (image * pixels + pixel) * CHANNELS + channel[None, :]
    y = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) * scale + offset
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def tile_of(channels: int) -> tuple[int, int]:
    """(rows, width): width is the largest power of two that divides the channels, so that no lane is idle, up to 512; where
    that is less than 8, which is 128 bits at half precision, the next power of two above them."""
    width = min(channels & -channels, MAX_WIDTH)
    if width < 8:
        width = min(1 << (channels - 1).bit_length(), MAX_WIDTH)
    return TILE // width, width


def splits_of(batch: int, channels: int, pixels: int) -> tuple[int, int]:
    """(programs that share the rows of an image, tiles of each)."""
    rows, width = tile_of(channels)
    columns, tiles = -(-channels // width), -(-pixels // rows)
    each = -(-tiles // max(1, PROGRAMS // (batch * columns)))
    return -(-tiles // each), each


def launch(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, out: Tensor
) -> None:
    """Start the kernels on a checked x (B, C, ...) whose channels lie side by side, and an out of its layout."""
    batch, channels = x.shape[:2]
    pixels, group_channels = x[0, 0].numel(), channels // groups
    (rows, width), (splits, tiles) = tile_of(channels), splits_of(batch, channels, pixels)
    columns, tiles_per_image = -(-channels // width), -(-pixels // rows)
    sums, squares = torch.empty(2, batch * splits, channels, dtype=torch.float32, device=x.device)
    scale, offset = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    tile: dict[str, Any] = {"CHANNELS": channels, "WIDTH": width, "ROWS": rows, "num_warps": WARPS}
    statistics_kernel[(programs(batch * splits, 1, 1), columns)](x, sums, squares, pixels, splits, tiles, **tile)
    wide = 1 << (group_channels - 1).bit_length()
    group = {"GROUPS": groups, "GROUP_CHANNELS": group_channels, "WIDTH": wide, "ROWS": max(1, TILE // wide)}
    joined = x, sums, squares, weight, bias, scale, offset, eps, pixels, splits
    finalise_kernel[(batch * groups,)](*joined, **group, num_warps=WARPS)
    normalise_kernel[(programs(batch * tiles_per_image, 1, 1), columns)](
        x, scale, offset, out, pixels, tiles_per_image, SILU=silu, **tile
    )


def has_channels_last(x: Tensor) -> bool:
    """Whether the channels (dimension 1) lie side by side, pixel after pixel: what the kernels read."""
    return x.movedim(1, -1).is_contiguous()


def reference(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """torch's GroupNorm and SiLU."""
    y = functional.group_norm(x, groups, weight, bias, eps)
    return functional.silu(y) if silu else y


def run(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """The kernels where they can run, else the reference, on checked tensors."""
    if not runs_kernel(x) or not has_channels_last(x):
        return reference(x, groups, weight, bias, eps, silu)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton starts on the current device, which may be another one
        launch(x, groups, weight, bias, eps, silu, out)
    return out


# what torch.compile sees; group_norm_silu is what to call
group_norm_op = torch.library.custom_op("imagine_flash::group_norm", run, mutates_args=())


@group_norm_op.register_fake
def _(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    return (
        torch.empty_like(x) if has_channels_last(x) else torch.empty_like(reference(x, groups, weight, bias, eps, silu))
    )


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
        x: (B, C, ...) float32, float16 or bfloat16; the kernels run on channels_last, torch's own on other layouts.
        weight, bias: (C,), both or none.
    Returns:
        A new tensor of x's dtype; channels_last stays so.
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
