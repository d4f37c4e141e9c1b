"""The networks of a latent text-to-image pipeline folder, and how they draw: deterministic steps of core's update table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor

from ..core.errors import ArtifactError
from ..core.noise import initial_noise
from ..core.prediction import x0_and_eps
from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable


@dataclass(frozen=True, kw_only=True)
class Networks:
    """A text encoder, a denoiser and an autoencoder with the schedule that they were trained on."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]
    schedule: NoiseSchedule
    prediction_type: str

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    def to(self, device: torch.device | str) -> Networks:
        for network in (self.text_encoder, self.unet, self.vae):
            network.to(device)
        return self

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, L) int64 token ids, padded and cut to the text encoder's context."""
        length = self.text_encoder.config.max_position_embeddings
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def embed(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, L, D) text embeddings."""
        return self.text_encoder(self.tokens(prompts).to(self.text_encoder.device))[0]

    def predict(self, x_t: torch.Tensor, t: int | torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The network's output m at x_t (B, C, h, w); t is one time or (B,)."""
        t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[0])
        return self.unet(x_t, t, encoder_hidden_states=text).sample

    def x0_eps(
        self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, unet: Any | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimates of x0 and eps at per-row times t (B,), in float32."""
        m = (unet or self.unet)(x_t, t, encoder_hidden_states=text).sample.float()
        alpha_t, sigma_t = self.signal_and_noise(t)
        return x0_and_eps(self.prediction_type, x_t.float(), m, alpha_t, sigma_t)

    def signal_and_noise(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t for integer times t (B,), as float32 of shape (B, 1, 1, 1)."""
        index = t.long().cpu().numpy()
        pair = (
            torch.from_numpy(table[index]).float().to(t.device) for table in (self.schedule.alpha, self.schedule.sigma)
        )
        alpha_t, sigma_t = (v.view(-1, 1, 1, 1) for v in pair)
        return alpha_t, sigma_t

    @torch.no_grad()
    def sample(
        self,
        x_T: torch.Tensor,
        text: torch.Tensor,
        table: UpdateTable,
        *,
        uncond: torch.Tensor | None = None,
        guidance: float = 1.0,
    ) -> torch.Tensor:
        """Latents x0 from noise x_T by a plan's table; with classifier-free guidance where `uncond` is given."""
        x = x_T.float()
        for a, b, t in zip(table.a, table.b, table.timesteps, strict=True):
            if uncond is None:
                m = self.predict(x, int(t), text)
            else:
                m_u, m_c = self.predict(torch.cat([x, x]), int(t), torch.cat([uncond.expand_as(text), text])).chunk(2)
                m = m_u + guidance * (m_c - m_u)
            x = float(a) * x + float(b) * m.float()
        return x

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) in about [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample


def plain_attention(networks: Networks) -> None:
    """Attention as matrix products: the fused one's backward takes half of a training step on a CPU at bf16."""
    networks.unet.set_attn_processor(AttnProcessor())
    networks.text_encoder.set_attn_implementation("eager")


def noise_of(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """(B, C, h, w) unit noise: for a seed, what the runtime draws from it too."""
    return torch.from_numpy(np.concatenate([initial_noise(seed, 1, shape) for seed in seeds]))


def load_networks(folder: str | Path) -> Networks:
    """Load a diffusers text-to-image folder in float32; ArtifactError in one line for what is not one."""
    folder = Path(folder)
    _check_folder(folder)
    from diffusers import DiffusionPipeline

    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # whatever a damaged folder makes the libraries raise
        raise ArtifactError(f"{folder} does not load in diffusers ({' '.join(str(error).split())[:300]})") from None
    config = dict(pipeline.scheduler.config)
    networks = Networks(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        unet=pipeline.unet,
        vae=pipeline.vae,
        scheduler_config=config,
        schedule=NoiseSchedule.from_scheduler_config(config),
        prediction_type=config.get("prediction_type", "epsilon"),
    )
    for network in (networks.text_encoder, networks.unet, networks.vae):
        network.eval().requires_grad_(False)
    return networks


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ArtifactError(
            f"no folder {folder}; give a diffusers pipeline folder, for example one made by train-teacher"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = index.get("_class_name")
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json") from None
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder / 'model_index.json'} is not JSON of a pipeline ({error})") from None
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise ArtifactError(f"{folder} has no {part}/: a pipeline of Stable Diffusion's form is needed")
    if kind != "StableDiffusionPipeline":
        raise ArtifactError(f"{folder} is a {kind}; known so far: StableDiffusionPipeline")
