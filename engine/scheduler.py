"""Imagine Flash's sampler inside diffusers: a scheduler for pipelines of people who stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from ..core.errors import PlanError, ScheduleError
from ..core.plan import StepPlan
from ..core.schedule import NoiseSchedule
from ..core.update import update_table
from ..kernels.update import Coefficients, coefficients_on, noise_corrected_update


class ImagineFlashScheduler(SchedulerMixin, ConfigMixin):
    """Few deterministic steps with noise correction (Kohler et al. 2024), as a drop-in for a student's DDIMScheduler.

        pipe.scheduler = ImagineFlashScheduler.from_config(pipe.scheduler.config)
        pipe("a cat", num_inference_steps=3, guidance_scale=1.0)

    Timesteps are trailing (3 steps: 999, 666, 333) unless the pipeline is called with `timesteps`. Noise correction applies
    where the trajectory starts at the last timestep, so not in image to image. Raises ScheduleError and PlanError.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        noise_correction: bool = True,
    ) -> None:
        self.schedule = NoiseSchedule.from_scheduler_config(dict(self.config))
        self.alphas_cumprod = torch.from_numpy(self.schedule.alpha**2).float()  # read by pipelines that inspect it
        self._use(StepPlan.trailing(3, num_train_timesteps), None)

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the plan: trailing with `num_inference_steps`, or the given `timesteps`, strictly decreasing."""
        if timesteps is not None:
            plan = StepPlan(tuple(int(t) for t in timesteps))
        elif num_inference_steps is not None:
            plan = StepPlan.trailing(int(num_inference_steps), self.schedule.num_train_timesteps)
        else:
            raise PlanError("give num_inference_steps or timesteps")
        self._use(plan, device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network reads x_t as it is."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where image to image starts; nothing depends on it, since a step is found by its timestep."""

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True,
        **_: Any,
    ) -> SchedulerOutput | tuple[torch.Tensor]:  # fmt: skip
        """x_s from x_t (`sample`) and the network's output, in float32, returned in the sample's dtype."""
        t = int(timestep)
        if t not in self._positions:
            raise ScheduleError(f"timestep {t} is not in the plan {list(self._positions)}; call set_timesteps first")
        coefficients = self._on(sample.device)
        out = torch.empty_like(sample)
        noise_corrected_update(sample, model_output, coefficients, self._positions[t], out=out)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t x0 + sigma_t eps at `timesteps` (B,) or (1,)."""
        alpha, sigma = self.schedule.at(timesteps.cpu().numpy().astype(np.int64))
        shape = (-1, *(1,) * (original.ndim - 1))
        alpha, sigma = (torch.from_numpy(np.atleast_1d(v)).to(original).view(shape) for v in (alpha, sigma))
        return alpha * original + sigma * noise

    def _use(self, plan: StepPlan, device: str | torch.device | None) -> None:
        config: Any = self.config
        kind = "flow" if self.schedule.kind == "flow" else config.prediction_type
        self._table = update_table(self.schedule, plan, kind, noise_correction=config.noise_correction)
        self._positions = {t: i for i, t in enumerate(plan.timesteps)}
        self._coefficients: Coefficients | None = None
        self.num_inference_steps = len(plan)
        self.timesteps = torch.tensor(plan.timesteps, dtype=torch.int64, device=device)

    def _on(self, device: torch.device) -> Coefficients:
        if self._coefficients is None or self._coefficients.rows.device != device:
            self._coefficients = coefficients_on(device, self._table)
        return self._coefficients
