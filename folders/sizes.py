"""Sizes of pictures: how they are written, and which a model draws that is not bound to a list of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = tuple[int, int]  # height, width in pixels


def size_name(size: Size) -> str:
    """A size as people write it, width first: (512, 768) is "768x512"."""
    return f"{size[1]}x{size[0]}"


def sizes_text(sizes: Iterable[Size], any_size: AnySize | None) -> str:
    """What is drawn, for people: any_size where there is one, else these sizes."""
    return str(any_size) if any_size else f"{', '.join(map(size_name, sizes))} (width x height)"


class AnySize(BaseModel):
    """Sizes that one set of graphs draws: height and width, each from `smallest` to `largest` in steps of `multiple`, in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    smallest: int = Field(ge=1)
    largest: int = Field(ge=1)
    multiple: int = Field(ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.smallest < self.largest or self.smallest % self.multiple or self.largest % self.multiple:
            raise ValueError(f"must run upwards in multiples of {self.multiple}, got {self.smallest}-{self.largest}")
        return self

    def __str__(self) -> str:
        return f"sides of {self.smallest} to {self.largest} in multiples of {self.multiple}"

    def holds(self, size: Size) -> bool:
        """Whether it draws that size."""
        return all(self.smallest <= side <= self.largest and side % self.multiple == 0 for side in size)

    def nearest(self, size: Size) -> Size:
        """Of what it draws, the size of nearly that shape that is nearest to it."""
        factor = max(self.smallest / min(size), min(1.0, self.largest / max(size)))
        sides = (round(side * factor / self.multiple) * self.multiple for side in size)
        height, width = (min(max(side, self.smallest), self.largest) for side in sides)
        return height, width

    @property
    def corners(self) -> tuple[Size, ...]:
        """Sizes at both ends of the range, the largest square left out: the widest, the smallest, the highest."""
        low, high = self.smallest, self.largest
        return (low, high), (low, low), (high, low)
