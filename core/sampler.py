"""How a few-step model goes from one noise level to the next: what it was trained for, beside its plan."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from .errors import ScheduleError
from .schedule import NoiseSchedule

Kind = Literal["deterministic", "renoise", "ancestral", "strategic"]
SIGMA_DATA = 0.5  # of consistency models (Song et al. 2023)


class Sampler(BaseModel):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z, where z is fresh noise and `kind` says how much of it there is.

    deterministic: c = 0, DDIM's and Euler's step. renoise: c = sigma_s, of consistency models (LCM), DMD2, Flash Diffusion,
    SANA-Sprint. ancestral: c^2 = sigma_s^2 (1 - (sigma_s alpha_t / (alpha_s sigma_t))^2), DDPM's posterior, of SDXL-Turbo.
    strategic: deterministic to floor((1 - gamma) s), then noised to s, of TCD (Zheng et al. 2024).
    boundary: a consistency model's timestep scaling k (LCM: 10): x0 gives way to c_out x0 + c_skip x_t, c_skip = d^2 /
    ((k t)^2 + d^2), c_out = k t / sqrt((k t)^2 + d^2), d = 0.5. start: x_T is unit noise, or sigma_T times that, as Euler's
    schedulers begin. end: the last step lands on x0, or on the schedule's least noisy level.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind = "deterministic"
    gamma: float = Field(default=0.3, ge=0, le=1)
    boundary: float | None = Field(default=None, gt=0)
    start: Literal["unit", "sigma"] = "unit"
    end: Literal["clean", "least"] = "clean"

    def fresh_noise(self, schedule: NoiseSchedule, now: Any, following: Any) -> Any:
        """c of steps from timesteps `now` to `following`, float64 (n,). Raises ScheduleError where the kind has none."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(now), schedule.at(following)
        if self.kind == "deterministic":
            return np.zeros(len(sigma_s))
        if self.kind == "renoise":
            return sigma_s
        if schedule.kind == "flow":
            raise ScheduleError(f"a flow has no {self.kind} sampler; take deterministic or renoise")
        if self.kind == "ancestral":
            return sigma_s * np.sqrt(np.maximum(0.0, 1.0 - (sigma_s * alpha_t / (alpha_s * sigma_t)) ** 2))
        between, _ = schedule.at(np.floor((1.0 - self.gamma) * np.asarray(following)))
        return np.sqrt(1.0 - (alpha_s / between) ** 2)

    def scalings(self, t: Any) -> tuple[Any, Any]:
        """(c_skip, c_out) at timesteps t: x0 gives way to c_out x0 + c_skip x_t."""
        if self.boundary is None:
            return 0.0, 1.0
        scaled = self.boundary * np.asarray(t, dtype=np.float64)
        return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)


DETERMINISTIC = Sampler()
