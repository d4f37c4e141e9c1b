"""Teacher and student as a training sees them: the stages of a diffusers pipeline, whatever its class, and its denoiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import _lru_cache_wrapper, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..core.errors import ArtifactError, RecipeError
from ..core.noise import step_noise
from ..core.prediction import x0_and_eps
from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable, sample
from ..folders.files import STUDENT_FILE
from ..pipelines.architectures import architecture_of, stages_of
from ..pipelines.loading import load_pipeline, load_student_pipeline
from ..pipelines.networks import Conditions
from ..pipelines.stages import Stages, quiet
from .recipe import DistillRecipe

Times = float | torch.Tensor  # one timestep index for the batch, or a whole one per row (B,)


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A network with the noise schedule that it was trained on.

    network(x_t, time, *conditions) -> m: x_t and m (B, C, h, w), time float32 (B,), conditions (B, ...).
    """

    network: nn.Module
    schedule: NoiseSchedule
    prediction_type: str

    @property
    def last_time(self) -> int:
        """T - 1, the noisiest timestep index."""
        return self.schedule.num_train_timesteps - 1

    def __call__(self, x_t: torch.Tensor, t: Times, text: Conditions) -> torch.Tensor:
        """m in float32 at timestep index t; the network computes in its own dtype."""
        dtype = next((p.dtype for p in self.network.parameters()), x_t.dtype)
        return self.network(x_t.to(dtype), self._network_time(t, x_t), *(each.to(dtype) for each in text)).float()

    def x0_eps(self, x_t: torch.Tensor, t: Times, text: Conditions) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimates of x0 and eps, float32."""
        return self.estimates(x_t, self(x_t, t, text), t)

    def estimates(self, x_t: torch.Tensor, m: torch.Tensor, t: Times) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 and eps of an output m at x_t, float32."""
        return x0_and_eps(self.prediction_type, x_t.float(), m, *self.scales(t, x_t))

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t: Times) -> torch.Tensor:
        """x_t = alpha_t x0 + sigma_t noise."""
        alpha_t, sigma_t = self.scales(t, x0)
        return alpha_t * x0 + sigma_t * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: Times) -> torch.Tensor:
        """What the network should say at alpha_t x0 + sigma_t noise: its own prediction type, as it was trained."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        if self.prediction_type == "flow":
            return noise - x0
        alpha_t, sigma_t = self.scales(t, x0)
        return alpha_t * noise - sigma_t * x0

    def with_network(self, network: nn.Module) -> Denoiser:
        """Another network of the same form on the same schedule."""
        return replace(self, network=network)

    def guided(self, text: Conditions, uncond: Conditions, guidance: torch.Tensor | float) -> Step:
        """(x_t, t) -> m_uncond + w (m - m_uncond), w: a number or (B,) (Ho & Salimans 2022, in Imagen's convention)."""
        both = tuple(torch.cat([u.expand_as(c), c]) for u, c in zip(uncond, text, strict=True))
        w = guidance.view(-1, 1, 1, 1) if isinstance(guidance, torch.Tensor) else guidance

        def step(x_t: torch.Tensor, t: Times) -> torch.Tensor:
            twice = torch.cat([t, t]) if isinstance(t, torch.Tensor) else t
            m_u, m_c = self(torch.cat([x_t, x_t]), twice, both).chunk(2)
            return m_u + w * (m_c - m_u)

        return step

    def scales(self, t: Times, like: torch.Tensor) -> tuple[Any, Any]:
        """alpha_t and sigma_t: numbers for one t; for a t per row float32 (B, 1, 1, 1)."""
        if not isinstance(t, torch.Tensor):
            alpha_t, sigma_t = self.schedule.at(t)
            return float(alpha_t), float(sigma_t)
        alpha_t, sigma_t, _ = tables_on(like.device, self.schedule)[:, t.to(like.device)]
        shape = (-1, *(1,) * (like.ndim - 1))
        return alpha_t.view(shape), sigma_t.view(shape)

    def _network_time(self, t: Times, x_t: torch.Tensor) -> torch.Tensor:
        """What the network is told at t, float32 (B,)."""
        if isinstance(t, torch.Tensor):
            return tables_on(x_t.device, self.schedule)[2, t.to(x_t.device)].expand(x_t.shape[0])
        return torch.full(x_t.shape[:1], float(self.schedule.network_time(t)), device=x_t.device)


def kept_tables(compute: Callable[..., torch.Tensor]) -> _lru_cache_wrapper[torch.Tensor]:
    """Computes a tensor once for the same arguments, and a real one: who asks first may be counting memory on fake tensors."""

    @lru_cache(16)
    def once(*arguments: Any) -> torch.Tensor:
        with _disable_current_modes():
            return compute(*arguments)

    return once


@kept_tables
def tables_on(device: torch.device, schedule: NoiseSchedule) -> torch.Tensor:
    """alpha, sigma and what the network is told, at every timestep index: float32 (3, T), uploaded once: a CUDA graph must not."""
    told = schedule.network_time(np.arange(schedule.num_train_timesteps))
    return torch.from_numpy(np.stack([schedule.alpha, schedule.sigma, told])).float().to(device)


NOT_DISTILLED = ("FluxPipeline",)
Step = Callable[[torch.Tensor, Times], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline of diffusers, its stages, its network, and the denoiser that this network is at the default size, or at any."""

    pipeline: Any
    stages: Stages
    network: Any
    denoiser: Denoiser
    any_size: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.stages.latent_shape(self.stages.default_size)

    def to(self, device: torch.device | str) -> Model:
        """Moves text encoders, network and autoencoder."""
        for part in (self.stages.text_encoder, self.denoiser.network, self.stages.decoder, self.stages.image_encoder):
            part.to(device)
        return self

    def with_network(self, network: nn.Module) -> Model:
        """The same stages around another network of the same form."""
        stages = self.stages
        size = None if self.any_size else stages.default_size
        wrapped = architecture_of(stages.pipeline).denoiser_of(network, size, stages.downscale)
        return replace(self, network=network, denoiser=replace(self.denoiser, network=wrapped))

    def of_any_size(self) -> Model:
        """The same, of a network that is told the size of the latents that it gets, where it is told one."""
        return replace(self, any_size=True).with_network(self.network)

    def trainable_copy(self) -> Model:
        """The same stages around a float32 copy of the network whose weights train."""
        return self.with_network(copy.deepcopy(self.network).float().requires_grad_(True))

    def tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """int64 (B, L) for every input of the text encoders."""
        return self.stages.encode_prompts(prompts)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Conditions:
        """What the network is told of the prompts: (B, ...) each."""
        return self.embed_tokens(self.tokens(prompts))

    def embed_negative(self, prompt: str = "") -> Conditions:
        """What guidance leads away from, (1, ...) each: as the pipeline's class embeds it, XL's zeros for no prompt."""
        text = self.embed([prompt])
        zeros = not prompt and self.pipeline.config.get("force_zeros_for_empty_prompt", False)
        return tuple(torch.zeros_like(each) for each in text) if zeros else text

    @torch.no_grad()
    def embed_tokens(self, tokens: dict[str, torch.Tensor]) -> Conditions:
        """The same from token ids; float32, since autocast to bfloat16 joins no float16."""
        encoder = self.stages.text_encoder
        device = next(encoder.parameters()).device
        return tuple(each.float() for each in encoder(*(ids.to(device) for ids in tokens.values())))

    @torch.no_grad()
    def sample(
        self,
        x_T: torch.Tensor,
        text: Conditions,
        table: UpdateTable,
        *,
        uncond: Conditions | None = None,
        guidance: float = 1.0,
        noises: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Latents x0 from noise x_T by a plan's table; with classifier-free guidance where `uncond` is given.

        noises: fresh noise of each step, for a table that re-noises.
        """
        plain: Step = lambda x_t, t: self.denoiser(x_t, t, text)  # noqa: E731
        step = plain if uncond is None else self.denoiser.guided(text, uncond, guidance)
        return sample(step, x_T.float(), table, noises=noises)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (B, C, h, w) -> pictures (B, H, W, 3) uint8."""
        pictures, _ = self.stages.decoder(latents)
        return pictures.cpu().numpy()


def model_of(pipeline: Any) -> Model:
    """The model of a pipeline in memory, frozen. Raises ArtifactError for a class that is not known."""
    stages = stages_of(pipeline)
    if stages.is_told_guidance or stages.pipeline in NOT_DISTILLED:
        why = "is told a guidance scale" if stages.is_told_guidance else "has not been tried"
        raise ArtifactError(f"a {stages.pipeline} of this kind {why}: it can be exported and drawn with, not distilled")
    if stages.control is not None:
        raise ArtifactError(
            f"a {stages.pipeline} can be exported and drawn with, not distilled; give the pipeline without its {stages.control}"
        )
    denoiser = Denoiser(
        network=stages.denoiser(stages.default_size),
        schedule=NoiseSchedule.from_scheduler_config(stages.scheduler),
        prediction_type=stages.prediction_type,
    )
    network = getattr(pipeline, architecture_of(stages.pipeline).network)
    return Model(pipeline=pipeline, stages=stages, network=network, denoiser=denoiser)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Model:
    """The model of a pipeline folder or hub id, or of a student, frozen. Raises ArtifactError for what is not one."""
    return model_of(pipeline_in(folder, dtype))


def pipeline_in(folder: str | Path, dtype: torch.dtype) -> Any:
    """Its pipeline. Raises ArtifactError."""
    is_student = (Path(folder) / STUDENT_FILE).is_file()
    return (load_student_pipeline if is_student else load_pipeline)(folder, dtype=dtype)


def load_teacher(folder: Path, recipe: DistillRecipe) -> Model:
    """The teacher in the recipe's type, but for the network, where a copy of it trains: that is as it is stored, until a task
    has taken the copy. RecipeError for plans that start elsewhere than at its T."""
    pipeline = pipeline_in(folder, getattr(torch, recipe.teacher_dtype))
    if recipe.lora is None and recipe.teacher_dtype != "float32":
        name = architecture_of(type(pipeline).__name__).network
        setattr(pipeline, name, _stored_network(folder, name, type(getattr(pipeline, name))))
    teacher = model_of(pipeline)
    last = teacher.denoiser.last_time
    for timesteps in recipe.plans.values():
        if timesteps[0] != last:
            raise RecipeError(f"plans must start at the teacher's last time {last}, got {list(timesteps)}")
    return teacher


def _stored_network(folder: Path, name: str, kind: Any) -> Any:
    """In float32, which holds all that a file may."""
    if (folder / STUDENT_FILE).is_file():  # its network may have adapters to be fused
        return getattr(pipeline_in(folder, torch.float32), name)
    with quiet():
        return kind.from_pretrained(
            str(folder), subfolder=name, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )


def plain_attention(model: Model) -> None:
    """Attention as matrix products, for a CPU alone: there the fused one's backward takes half of a training step at bf16. On a
    GPU the whole matrix of every head would be kept, of which the fused one makes none."""
    if hasattr(model.network, "down_blocks"):  # a transformer's attention has processors of its own
        model.network.set_attn_processor(AttnProcessor())
        model.pipeline.text_encoder.set_attn_implementation("eager")


def noise_of(seeds: Sequence[int], shape: tuple[int, int, int], draw: int = 0) -> torch.Tensor:
    """(B, C, h, w) unit noise: for a seed, what the runtime draws from it too; draw: 0 is x_T, k the k-th step's."""
    return torch.from_numpy(np.concatenate([step_noise(seed, 1, shape, draw) for seed in seeds]))


def noises_of(seeds: Sequence[int], shape: tuple[int, int, int], table: UpdateTable) -> list[torch.Tensor]:
    """The fresh noise of each step of a table; none where it does not re-noise."""
    steps = range(max(table.renoised, default=-1) + 1)
    return [noise_of(seeds, shape, step + 1) for step in steps]
