"""A data set of one point, whose denoiser is known in closed form: the teacher and the student of the oracle tests."""

from typing import Any

import torch
from torch import nn

from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.distill.models import Denoiser

SD_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


class PointDenoiser(nn.Module):
    """v = alpha eps - sigma x0 where every data point is `point` (C, 1, 1), plus a learnable `shift` that is 0 when right."""

    def __init__(self, point: torch.Tensor, schedule: NoiseSchedule, shift: float = 0.0) -> None:
        super().__init__()
        self.point: torch.Tensor
        self.register_buffer("point", point)
        self.shift = nn.Parameter(torch.tensor(shift))
        self.schedule = schedule
        self.calls: list[int] = []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.calls.append(int(t[0]))
        pair = (
            torch.from_numpy(table[t.long().numpy()]).float().view(-1, 1, 1, 1)
            for table in (self.schedule.alpha, self.schedule.sigma)
        )
        alpha_t, sigma_t = pair
        point = self.point + text.mean((1, 2)).view(-1, 1, 1, 1)  # another point for another text
        eps = (x_t - alpha_t * point) / sigma_t
        return alpha_t * eps - sigma_t * point + self.shift


def point_denoiser(shift: float = 0.0) -> Any:
    """A PointDenoiser at (1, -2, 0.5) on Stable Diffusion's schedule."""
    schedule = NoiseSchedule.from_scheduler_config(SD_CONFIG)
    network = PointDenoiser(torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1), schedule, shift)
    return Denoiser(network=network, schedule=schedule, prediction_type="v_prediction")


class GaussianDenoiser(nn.Module):
    """v of data N(mean + text, deviation^2) in every coordinate, in closed form; `shift` is added to the x0 behind it."""

    def __init__(self, schedule: NoiseSchedule, mean: float, deviation: float, shift: float = 0.0) -> None:
        super().__init__()
        self.schedule, self.mean, self.deviation = schedule, mean, deviation
        self.shift = nn.Parameter(torch.tensor(shift))

    def x0(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """E[x0 | x_t] = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m)."""
        alpha, sigma = scales(self.schedule, t)
        m, variance = self.mean + text.mean((1, 2)).view(-1, 1, 1, 1), self.deviation**2
        return m + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * m)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        alpha, sigma = scales(self.schedule, t)
        return (alpha * x_t - self.x0(x_t, t, text) - self.shift) / sigma


def scales(schedule: NoiseSchedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t (B, 1, 1, 1) in float32."""
    alpha, sigma = (torch.from_numpy(table[t.long().numpy()]).float() for table in (schedule.alpha, schedule.sigma))
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


def gaussian_denoiser(mean: float = 0.5, deviation: float = 0.4, shift: float = 0.0) -> Any:
    """A GaussianDenoiser on Stable Diffusion's schedule."""
    schedule = NoiseSchedule.from_scheduler_config(SD_CONFIG)
    network = GaussianDenoiser(schedule, mean, deviation, shift)
    return Denoiser(network=network, schedule=schedule, prediction_type="v_prediction")
