"""Height and width left free in a graph: what torch.export is told of them, and what the axes are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..folders.sizes import AnySize, Size
from ..pipelines.stages import CONDITION, IMAGES

SIDES = ("height", "width")
PICTURES = (IMAGES, CONDITION)  # (B, H, W, 3); every other tensor of four axes is (B, C, h, w)


@dataclass(frozen=True)
class FreeSides:
    """The sides of pictures of any size. traced: the size of the example that a graph is traced with."""

    traced: Size
    any_size: AnySize

    @classmethod
    def around(cls, size: Size, any_size: AnySize) -> FreeSides:
        """Traced with that size, each side of two multiples at least: torch.export takes an axis of 1 for a fixed one."""
        height, width = (max(side, 2 * any_size.multiple) for side in size)
        return cls((height, width), any_size)

    def names(self, tensor: str, shape: Sequence[int]) -> dict[int, str]:
        """By axis, what it is called in the graph: "height", or "height/8" where 8 pixels are one element."""
        return {axis: side if pixels == 1 else f"{side}/{pixels}" for axis, side, pixels in self._axes(tensor, shape)}

    def dims(self, tensor: str, shape: Sequence[int]) -> dict[int, Any]:
        """By axis, a multiple of what torch.export is to think of: the number of `multiple`s in the side."""
        multiple = self.any_size.multiple
        low, high = self.any_size.smallest // multiple, self.any_size.largest // multiple
        return {
            axis: multiple // pixels * torch.export.Dim(f"{side}_units", min=low, max=high)
            for axis, side, pixels in self._axes(tensor, shape)
        }

    def _axes(self, tensor: str, shape: Sequence[int]) -> list[tuple[int, str, int]]:
        """The axes of a tensor of this shape at the traced size: each with its side, and the pixels of one element."""
        if len(shape) != 4:
            return []
        first = 1 if tensor in PICTURES else 2
        return [
            (first + i, side, pixels // shape[first + i])
            for i, (side, pixels) in enumerate(zip(SIDES, self.traced, strict=True))
        ]
