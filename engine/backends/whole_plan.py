"""A plan from noise to pictures as one call of torch, so that a lone picture is one CUDA graph and the host launches once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...core.schedule import NoiseSchedule
from ...core.update import UpdateTable
from .fused_update import FusedUpdate

LONGEST = 4  # steps; whoever asks meanwhile waits until all of them are done
Denoise = Callable[..., torch.Tensor]  # x, timestep (1,), conditions -> m
Decode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # latents -> pictures, which are finite


class WholePlan:
    """(conditions, each (1, ...), noise (1, C, h, w) and, of a plan that re-noises, (1, k, C, h, w)) -> what `decode` gives.

    The arithmetic is that of the single steps, in the same kernels: x_T = start z, then x_s = a x + b m + c z.
    """

    def __init__(
        self,
        table: UpdateTable,
        schedule: NoiseSchedule,
        denoise: Denoise,
        decode: Decode,
        update: FusedUpdate,
        like: torch.Tensor,
    ) -> None:
        """like: in the device and the precision of the denoiser's latents."""
        self.denoise, self.decode, self.update = denoise, decode, update
        self.start, self.dtype, self.renoised = table.start, like.dtype, table.renoised
        self.times = [torch.full((1,), float(schedule.network_time(t)), device=like.device) for t in table.timesteps]
        self.columns = [column.astype("float32") for column in (table.a, table.b, table.c)]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = inputs[-1] if self.renoised else None
        conditions, noise = (inputs[:-2], inputs[-2]) if self.renoised else (inputs[:-1], inputs[-1])
        x = noise * self.start
        given = x.to(self.dtype)
        for i, t in enumerate(self.times):
            m = self.denoise(given, t, *conditions)
            a, b, c = (column[i : i + 1] for column in self.columns)
            z = fresh[:, self.renoised.index(i)] if fresh is not None and i in self.renoised else None
            given = torch.empty_like(x, dtype=self.dtype)
            x = self.update(x, m, a, b, c, noise=z, network_input=given)
        return self.decode(x)
