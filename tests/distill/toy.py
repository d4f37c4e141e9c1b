"""A data set of one point, whose denoiser is known in closed form: the teacher and the student of the oracle tests."""

from types import SimpleNamespace

import torch
from torch import nn

from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.distill.networks import Networks

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
        self.config = SimpleNamespace(in_channels=point.shape[0], sample_size=4)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        self.calls.append(int(t[0]))
        pair = (
            torch.from_numpy(table[t.long().numpy()]).float().view(-1, 1, 1, 1)
            for table in (self.schedule.alpha, self.schedule.sigma)
        )
        alpha_t, sigma_t = pair
        point = self.point + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)  # another point for another text
        eps = (x_t - alpha_t * point) / sigma_t
        return SimpleNamespace(sample=alpha_t * eps - sigma_t * point + self.shift)


def point_networks(shift: float = 0.0) -> Networks:
    """Networks around a PointDenoiser at (1, -2, 0.5)."""
    schedule = NoiseSchedule.from_scheduler_config(SD_CONFIG)
    unet = PointDenoiser(torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1), schedule, shift)
    return Networks(
        tokenizer=None,
        text_encoder=None,
        unet=unet,
        vae=None,
        scheduler_config=SD_CONFIG,
        schedule=schedule,
        prediction_type="v_prediction",
    )
