"""How torch's networks are made ready for one batch size: compiled, and with the kernels that were tried out on this device.

The settings are those that PyTorch's gpt-fast family (segment-anything-fast, flux-fast) and diffusers' guide to speed publish. What
float32 computes in is left alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ...folders.cache import mark_used
from ...folders.files import cache_folder
from .base import Stopped
from .torch_modes import Capture, Network

COMPILED, PLACE = "torch-compile", "TORCHINDUCTOR_CACHE_DIR"
OPTIONS = {  # torch.compile's mode max-autotune-no-cudagraphs, since we capture, and what is published beside it
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
    "conv_1x1_as_mm": True,
    "force_fuse_int_mm_with_mul": True,  # of matrices in 8 bits
    "autotune_num_choices_displayed": 0,  # on standard error, a table for each product
}
ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
Stopwatch = Callable[[], Callable[[], Stopped]]  # as of a backend
TURNS = 5  # of each kind of attention; the fastest counts


def keep_compiled() -> None:
    """Has torch keep what it compiles, and what it found out about kernels, in this project's cache instead of a folder of the
    system's that is emptied; unless this process has a place for it already."""
    if (folder := cache_folder(COMPILED)) is not None:
        os.environ.setdefault(PLACE, str(folder))  # torch knows no other way
        mark_used(folder)


def fuse_projections(network: torch.nn.Module) -> int:
    """One product for queries, keys and values where diffusers' networks know how to; what they were made of stays beside
    it. Returns how many networks did."""
    fused = 0
    for part in list(network.modules()):
        fuse: Callable[[], None] | None = getattr(part, "fuse_qkv_projections", None)
        if fuse is not None and not getattr(part, "original_attn_processors", None):
            try:
                fuse()
            except ValueError:  # attention that reads the text in two ways
                continue
            fused += 1
    network.requires_grad_(False)  # the products are new
    return fused


class Maker:
    """Networks for one batch size. Compiled where `compiles`; where `tunes`, also with the compiler's kernels chosen by measuring;
    and where they are captured, with the convolutions and the kind of attention that measured fastest."""

    def __init__(self, compiles: bool, tunes: bool, capture: Capture | None, stopwatch: Stopwatch) -> None:
        self.compiles, self.tunes = compiles, tunes
        self._capture, self._stopwatch = capture, stopwatch
        self._attention: set[str] = set()
        if compiles:
            keep_compiled()

    @property
    def how(self) -> list[str]:
        """What was done, in words."""
        return ["compiled"] * self.compiles + ["tuned"] * self.tunes + sorted(self._attention)

    def __call__(self, network: Network, inputs: Sequence[torch.Tensor]) -> Network:
        """The network for tensors like these, made under inference mode."""
        if not self.tunes or self._capture is None:
            return self._compiled(network, inputs)
        order = fastest_attention(network, inputs, self._capture, self._stopwatch)
        self._attention |= {f"attention {order[0].name.partition('_')[0].lower()}"} if order else set()
        with _kernels(order):
            made = self._compiled(network, inputs)

        def run(*given: torch.Tensor) -> Any:
            with _kernels(order):
                return made(*given)

        return run

    def _compiled(self, network: Network, inputs: Sequence[torch.Tensor]) -> Network:
        return compiled(network, inputs, OPTIONS if self.tunes else None) if self.compiles else network


def compiled(network: Network, inputs: Sequence[torch.Tensor], options: dict[str, Any] | None = None) -> Network:
    """The network compiled for tensors like these, made under inference mode."""
    fast = torch.compile(network, dynamic=False, options=options)
    with torch._dynamo.config.patch(recompile_limit=1024):  # every batch size of every size is one
        fast(*inputs)
    # what the batcher computes by itself is not of that kind, and would be compiled for anew
    return lambda *given: fast(*(values if values.is_inference() else values.clone() for values in given))


class AttentionCalls(TorchFunctionMode):
    """Remembers what a network attends over: `found` holds one call of each kind, and how often it came."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Callable[[], torch.Tensor], int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            kind = repr([_shape(value) for value in (*args, *sorted(kwargs.items()))])
            call, count = self.found.get(kind, (lambda: scaled_dot_product_attention(*args, **kwargs), 0))
            self.found[kind] = call, count + 1
        return func(*args, **kwargs)


def _shape(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_shape(each) for each in value]
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def fastest_attention(
    network: Network, inputs: Sequence[torch.Tensor], capture: Capture, stopwatch: Stopwatch
) -> list[SDPBackend]:
    """The kinds of attention in the order in which torch should try them: before the others the one whose first place took
    the device least, on all that this network attends over. Empty where it attends over nothing.

    Measured as graphs, since launching a short kernel takes longer than running it.
    """
    with AttentionCalls() as calls:
        network(*inputs)
    taken = dict[SDPBackend, float]()

    def attend() -> list[torch.Tensor]:
        return [call() for call, count in calls.found.values() for _ in range(count)]

    for first in ATTENTION[:-1] if calls.found else ():
        with warnings.catch_warnings(), sdpa_kernel(_from(first), set_priority=True):
            warnings.simplefilter("ignore")
            try:
                replay, _ = capture(attend)
                taken[first] = min(_seconds(replay, stopwatch) for _ in range(TURNS))
            except RuntimeError:  # a kernel that fails on these shapes
                continue
    return _from(min(taken, key=taken.__getitem__)) if taken else []


def _from(first: SDPBackend) -> list[SDPBackend]:
    return [first, *(other for other in ATTENTION if other is not first)]


def _seconds(replay: Callable[[], None], stopwatch: Stopwatch) -> float:
    stop = stopwatch()
    replay()
    return stop()()


@contextmanager
def _kernels(attention: list[SDPBackend]) -> Iterator[None]:
    """cuDNN tries its convolutions out at the first call of each shape, and attention is of the first kind that can."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        if not attention:
            yield
            return
        with sdpa_kernel(attention, set_priority=True):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
