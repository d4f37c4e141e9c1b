"""The one place that knows each pipeline class: what its text encoders give, and what its denoiser is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import ArtifactError, nearest
from ..folders.manifests import Size
from .stages import Decoder, ImageEncoder, Stages, TokenInput, downscale_of

EMBEDDINGS, POOLED, MASK = "embeddings", "pooled", "text_mask"
Conditions = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Architecture:
    """How one pipeline class becomes stages. text: (pipeline) -> (module, tokenizers, names of the conditions)."""

    network: str  # the denoiser's component
    parts: tuple[str, ...]  # the other components it needs
    text: Callable[[Any], tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]]
    denoiser: Callable[[Any, Size], torch.nn.Module]

    @property
    def components(self) -> tuple[str, ...]:
        """All components of the pipeline folder that the stages are made of."""
        return (self.network, "vae", *self.parts, "scheduler")


def architecture_of(pipeline_class: str) -> Architecture:
    """Raises ArtifactError that lists the known classes."""
    if pipeline_class not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ArtifactError(
            f"cannot read a {pipeline_class}{nearest(pipeline_class, ARCHITECTURES)}; known classes: {known}"
        )
    return ARCHITECTURES[pipeline_class]


def stages_of(pipeline: Any) -> Stages:
    """The stages of a pipeline in memory (on the CPU). Raises ArtifactError for one that is not text to image."""
    name = type(pipeline).__name__
    architecture = architecture_of(name)
    for part in architecture.components:
        if getattr(pipeline, part, None) is None:
            raise ArtifactError(f"the {name} has no {part}; a student needs {', '.join(architecture.components)}")
        if isinstance(module := getattr(pipeline, part), torch.nn.Module):
            module.eval().requires_grad_(False)
    network = getattr(pipeline, architecture.network)
    decoder = Decoder(pipeline.vae)
    channels, latent_channels = network.config.in_channels, decoder.vae.config.latent_channels
    if channels != latent_channels:
        raise ArtifactError(
            f"the {architecture.network} takes {channels} channels and the vae has {latent_channels}; "
            "only text-to-image students are read"
        )
    if network.config.get("time_cond_proj_dim"):
        raise ArtifactError(
            f"the {architecture.network} is told a guidance scale (time_cond_proj_dim); students are not"
        )
    downscale = downscale_of(decoder, channels)
    side = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    text, tokens, conditions = architecture.text(pipeline)
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    return Stages(
        pipeline=name,
        tokens=tokens,
        text_encoder=text,
        conditions=conditions,
        denoiser=lambda size: architecture.denoiser(network, size),
        decoder=decoder,
        image_encoder=ImageEncoder(decoder),
        scheduler=scheduler,
        latent_channels=channels,
        downscale=downscale,
        multiple=downscale * int(network.config.get("patch_size") or 1),
        default_size=(height * downscale, width * downscale),
    )


class ClipText(torch.nn.Module):
    """input_ids (B, L) -> embeddings (B, L, D): the last hidden state."""

    def __init__(self, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> Conditions:
        return (self.text_encoder(input_ids).last_hidden_state,)


class TwoClipTexts(torch.nn.Module):
    """Two ids (B, L) -> embeddings (B, L, D1 + D2) of the layers before the last, pooled (B, P): the second's projection,
    or, with both_pooled, both side by side (Stable Diffusion 3)."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module, *, both_pooled: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.both_pooled = first, second, both_pooled

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> Conditions:
        one = self.first(input_ids, output_hidden_states=True)
        two = self.second(input_ids_2, output_hidden_states=True)
        embeddings = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        pooled = torch.cat([one.text_embeds, two.text_embeds], dim=-1) if self.both_pooled else two.text_embeds
        return embeddings, pooled


class ClipAndT5Texts(torch.nn.Module):
    """Three ids -> embeddings (B, L + L_T5, D_T5): both CLIPs, padded with zeros to T5's width, then T5; pooled (B, P)."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module, third: torch.nn.Module) -> None:
        super().__init__()
        self.clip, self.t5 = TwoClipTexts(first, second, both_pooled=True), third

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor, input_ids_3: torch.Tensor) -> Conditions:
        clip, pooled = self.clip(input_ids, input_ids_2)
        t5 = self.t5(input_ids_3)[0]
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=-2), pooled


class T5Text(torch.nn.Module):
    """input_ids, attention_mask (B, L) -> embeddings (B, L, D), attention_mask float32 (B, L)."""

    def __init__(self, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Conditions:
        return self.text_encoder(input_ids, attention_mask=attention_mask)[0], attention_mask.to(torch.float32)


class UNet(torch.nn.Module):
    """latents (B, C, h, w), timestep float32 (B,), embeddings (B, L, D) -> m (B, C, h, w)."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return self.unet(latents, timestep, embeddings, return_dict=False)[0]


class UNetXL(torch.nn.Module):
    """As UNet, with pooled (B, P); the network is told the image's size, uncropped."""

    time_ids: torch.Tensor

    def __init__(self, unet: torch.nn.Module, size: Size) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("time_ids", torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32), persistent=False)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": self.time_ids.expand(latents.shape[0], -1)}
        return self.unet(latents, timestep, embeddings, added_cond_kwargs=added, return_dict=False)[0]


class PixArt(torch.nn.Module):
    """As UNet, with attention_mask (B, L); of a network that also predicts a variance, the mean alone."""

    resolution: torch.Tensor
    aspect_ratio: torch.Tensor

    def __init__(self, transformer: Any, size: Size) -> None:
        super().__init__()
        self.transformer = transformer
        self.learned_sigma = transformer.config.out_channels == 2 * transformer.config.in_channels
        self.told_size = transformer.config.sample_size == 128  # as diffusers' pipeline decides
        self.register_buffer("resolution", torch.tensor([size], dtype=torch.float32), persistent=False)
        self.register_buffer("aspect_ratio", torch.tensor([[size[0] / size[1]]]), persistent=False)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        told = {"resolution": self.resolution, "aspect_ratio": self.aspect_ratio}
        added = {name: v.expand(latents.shape[0], -1) if self.told_size else None for name, v in told.items()}
        m = self.transformer(
            latents,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=attention_mask,
            timestep=timestep,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return m.chunk(2, dim=1)[0] if self.learned_sigma else m


class SD3(torch.nn.Module):
    """As UNet, with pooled (B, P)."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            timestep=timestep,
            return_dict=False,
        )[0]


def _clip_length(pipeline: Any, suffix: str = "") -> int:
    """What a CLIP reads: the tokenizer may say more than its encoder has positions."""
    tokenizer, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)


def _sd_text(p: Any) -> tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]:
    if getattr(p.text_encoder.config, "use_attention_mask", False):
        raise ArtifactError(
            "the text encoder asks for an attention mask (use_attention_mask), which no CLIP student needs"
        )
    return ClipText(p.text_encoder), (TokenInput("input_ids", p.tokenizer, _clip_length(p)),), (EMBEDDINGS,)


def _sdxl_text(p: Any) -> tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]:
    tokens = (
        TokenInput("input_ids", p.tokenizer, _clip_length(p)),
        TokenInput("input_ids_2", p.tokenizer_2, _clip_length(p, "_2")),
    )
    return TwoClipTexts(p.text_encoder, p.text_encoder_2), tokens, (EMBEDDINGS, POOLED)


def _sd3_text(p: Any) -> tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]:
    tokens = (
        TokenInput("input_ids", p.tokenizer, _clip_length(p), truncates=True),
        TokenInput("input_ids_2", p.tokenizer_2, _clip_length(p, "_2"), truncates=True),
        TokenInput("input_ids_3", p.tokenizer_3, 256),
    )
    return ClipAndT5Texts(p.text_encoder, p.text_encoder_2, p.text_encoder_3), tokens, (EMBEDDINGS, POOLED)


def _pixart_text(length: int) -> Callable[[Any], tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]]:
    def text(p: Any) -> tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]:
        tokens = TokenInput("input_ids", p.tokenizer, length, mask="attention_mask", lowercase=True)
        return T5Text(p.text_encoder), (tokens,), (EMBEDDINGS, MASK)

    return text


def _pixart(length: int) -> Architecture:
    return Architecture("transformer", ("text_encoder", "tokenizer"), _pixart_text(length), PixArt)


_TWO = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_SD = Architecture("unet", ("text_encoder", "tokenizer"), _sd_text, lambda unet, size: UNet(unet))
ARCHITECTURES: dict[str, Architecture] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLPipeline": Architecture("unet", _TWO, _sdxl_text, UNetXL),
    "StableDiffusion3Pipeline": Architecture(
        "transformer", (*_TWO, "text_encoder_3", "tokenizer_3"), _sd3_text, lambda transformer, size: SD3(transformer)
    ),
    "PixArtAlphaPipeline": _pixart(120),
    "PixArtSigmaPipeline": _pixart(300),
}
