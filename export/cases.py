"""What torch drew, for the exported graphs to be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable
from ..folders.manifests import Size, size_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """The plans by number of steps, as the update's coefficients, and the schedule that says what the network is told.

    guidance: the scale that it is told, where it is told one.
    """

    tables: dict[int, UpdateTable]
    schedule: NoiseSchedule
    guidance: float | None = None


@dataclass(frozen=True)
class Case:
    """One batch of prompts at one size, with its noise, and what torch makes of it."""

    prompts: tuple[str, ...]
    seed: int
    size: Size
    tokens: dict[str, torch.Tensor]  # int64 (B, L) by input name
    noise: torch.Tensor  # float32 (B, C, h, w)
    fresh: torch.Tensor  # float32 (B, steps, C, h, w): z of every step, of the longest plan that re-noises
    condition: torch.Tensor  # uint8 (B, H, W, 3): the conditioning pictures, which a ControlNet or T2I-adapter reads
    conditions: tuple[torch.Tensor, ...]
    told: dict[str, torch.Tensor]  # what the denoiser takes beside them, by input name
    walks: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]  # by steps: x_t, t, m of every step
    latents: dict[int, torch.Tensor]  # by steps: x0
    images: dict[int, torch.Tensor]  # by steps: uint8 (B, H, W, 3)
    encoded: dict[int, torch.Tensor]  # by steps: the images as latents again

    def noises_of(self, table: UpdateTable) -> list[torch.Tensor]:
        """What a whole-sampler graph of the plan takes."""
        return [self.noise, *([self.fresh[:, list(table.renoised)].contiguous()] if table.renoised else [])]

    def __str__(self) -> str:
        return f"prompt {self.prompts[0]!r}, seed {self.seed}, batch {len(self.prompts)}, size {size_name(self.size)}"
