"""The three networks of a student as torch modules with the inputs and outputs that the graphs have."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ArtifactError, missing_extra

try:
    import torch
except ImportError:
    raise missing_extra("torch", "export") from None

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class TextEncoder(torch.nn.Module):
    """input_ids int64 (B, L) -> embeddings float32 (B, L, D): the last hidden state, as StableDiffusionPipeline uses."""

    def __init__(self, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(input_ids).last_hidden_state


class Denoiser(torch.nn.Module):
    """latents float32 (B, C, h, w), timestep float32 (B,), embeddings float32 (B, L, D) -> m float32 (B, C, h, w)."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return self.unet(latents, timestep, embeddings, return_dict=False)[0]


class Decoder(torch.nn.Module):
    """latents float32 (B, C, h, w) -> images uint8 (B, H, W, 3): unscale, decode, [-1, 1] to 0..255, round half to even."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.get("shift_factor") or 0.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images float32 (B, 3, H, W), about [-1, 1]."""
        z = latents * (1.0 / self.scaling_factor)
        if self.shift_factor:
            z = z + self.shift_factor
        return self.vae.decode(z, return_dict=False)[0]

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = (self.decode(latents) * 127.5 + 127.5).clamp(0.0, 255.0).round()
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)


@dataclass(frozen=True)
class Stages:
    """A student's networks, float32, in evaluation mode, on the CPU, and what the graphs' shapes follow from."""

    text_encoder: TextEncoder
    denoiser: Denoiser
    decoder: Decoder
    tokenizer: Any
    scheduler: dict[str, Any]
    latent_shape: tuple[int, int, int]  # C, h, w
    image_size: tuple[int, int]  # H, W
    context_length: int

    @property
    def prediction_type(self) -> str:
        """The scheduler config's prediction_type; flow matching has none of its own."""
        if str(self.scheduler.get("_class_name", "")).startswith("FlowMatch"):
            return "flow"
        return self.scheduler.get("prediction_type", "epsilon")


def load_stages(student: str | Path) -> Stages:
    """Loads the diffusers pipeline of a student folder. Raises ArtifactError, MissingExtraError."""
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except ImportError:
        raise missing_extra("diffusers", "export") from None
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                str(student), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # whatever a damaged folder makes the libraries raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{student} does not load in diffusers: {reason}") from error
    missing = [part for part in PARTS if getattr(pipeline, part, None) is None]
    if missing:
        raise ArtifactError(
            f"{student} has no {missing[0]}; a student is a text-to-image pipeline with {', '.join(PARTS)}"
        )
    return stages_of(pipeline)


def stages_of(pipeline: Any) -> Stages:
    """The stages of a pipeline in memory (float32)."""
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipeline, part).eval().requires_grad_(False)
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    latent_shape = (pipeline.unet.config.in_channels, height, width)
    decoder = Decoder(pipeline.vae)
    with torch.inference_mode():
        image = decoder(torch.zeros(1, *latent_shape))  # (1, H, W, 3)
    return Stages(
        text_encoder=TextEncoder(pipeline.text_encoder),
        denoiser=Denoiser(pipeline.unet),
        decoder=decoder,
        tokenizer=pipeline.tokenizer,
        scheduler=dict(pipeline.scheduler.config),
        latent_shape=latent_shape,
        image_size=(image.shape[1], image.shape[2]),
        context_length=min(pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' notes (missing torchvision, deprecated names, progress bars) while we call them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    levels_of_hub = (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity())
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        diffusers_logging.set_verbosity(levels_of_hub[0])
        transformers_logging.set_verbosity(levels_of_hub[1])
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
