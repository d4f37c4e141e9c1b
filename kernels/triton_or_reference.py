"""Whether a kernel or its reference runs: Triton is optional, and the reference is what runs without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

triton: Any = None
if TYPE_CHECKING:
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # on systems that Triton does not support
        tl = None

MAX_PROGRAMS = 2**31 - 1  # of a grid's first axis


def jit(*, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """triton.jit, or a stand-in that leaves the function as it is where there is no Triton."""
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(do_not_specialize))


def runs_kernel(tensor: torch.Tensor) -> bool:
    """True on a GPU, and on the CPU under TRITON_INTERPRET=1, where Triton is installed."""
    return triton is not None and (tensor.is_cuda or triton.knobs.runtime.interpret)


def programs(rows: int, row_elements: int, block: int) -> int:
    """How many programs cover `rows` rows of `row_elements`, each row by itself. ValueError beyond what a grid holds."""
    count = rows * -(-row_elements // block)
    if count > MAX_PROGRAMS:
        raise ValueError(
            f"{rows} rows of {row_elements} elements need {count} programs, a grid holds {MAX_PROGRAMS}; split the batch"
        )
    return count


def memory_format_of(tensor: torch.Tensor) -> torch.memory_format | None:
    """The dense layout of a tensor, contiguous before channels_last; None for one with gaps or another order."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None
