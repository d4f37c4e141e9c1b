"""The one place that knows each pipeline class: what its text encoders give, and what its denoiser is asked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.errors import ArtifactError, nearest
from ..folders.sizes import Size
from ..models.control import PARTS, PIPELINES
from .control import Control, control_of
from .networks import (
    SD3,
    ClipAndT5Texts,
    ClipText,
    Flux,
    GemmaText,
    PixArt,
    PooledAndT5Texts,
    Sana,
    T5Text,
    TwoClipTexts,
    UNet,
    UNetXL,
)
from .stages import Decoder, ImageEncoder, Stages, TokenInput, downscale_of

SIDE = 128  # latents of a side where a network's config does not say, as of FLUX: 1024 pixels
EMBEDDINGS, POOLED, MASK = "embeddings", "pooled", "text_mask"


@dataclass(frozen=True)
class Architecture:
    """How one pipeline class becomes stages. text: (pipeline) -> (module, tokenizers, names of the conditions). vae_fields: what
    the class reads of the vae's config beside scaling_factor. embedded: the network's addition_embed_type. packs: latents of a side
    that the network takes as channels. control: the component that reads a conditioning picture."""

    network: str  # the denoiser's component
    parts: tuple[str, ...]  # the other components it needs
    text: Callable[[Any], tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]]
    denoiser: Callable[[Any, Any], torch.nn.Module]  # of a network and a size, or None: any, but of FLUX
    vae_fields: tuple[str, ...] = ()
    embedded: str | None = None
    packs: int = 1
    control: str | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """All components of the pipeline folder that the stages are made of."""
        return (self.network, "vae", *self.parts, "scheduler")

    def denoiser_of(self, network: Any, size: Size | None, downscale: int) -> Any:
        """The denoiser that a network of this class is, for pictures of that size, or of any."""
        denoiser = self.denoiser(network, size)
        if isinstance(denoiser, UNetXL | PixArt):
            denoiser.downscale = downscale
        return denoiser


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
    decoder = Decoder(pipeline.vae, architecture.vae_fields)
    channels, latent_channels = network.config.in_channels // architecture.packs**2, decoder.vae.config.latent_channels
    if channels != latent_channels:
        raise ArtifactError(
            f"the {architecture.network} takes {channels} channels and the vae has {latent_channels}; "
            "only text-to-image students are read"
        )
    _check_network(network, architecture)
    downscale = downscale_of(decoder, channels)
    side = network.config.get("sample_size") or SIDE
    height, width = (side, side) if isinstance(side, int) else side
    text, tokens, conditions = architecture.text(pipeline)
    if architecture.text is _sdxl_text:
        _check_projection(network, pipeline.text_encoder_2.config.projection_dim)
    control = None
    if architecture.control is not None:
        control = control_of(getattr(pipeline, architecture.control), network.config, downscale)
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    patch = int(network.config.get("patch_size") or 1)
    return Stages(
        pipeline=name,
        tokens=tokens,
        text_encoder=text,
        conditions=conditions,
        denoiser=lambda size: _controlled(architecture.denoiser_of(network, size, downscale), control),
        decoder=decoder,
        image_encoder=ImageEncoder(decoder),
        scheduler=scheduler,
        latent_channels=channels,
        downscale=downscale,
        multiple=math.lcm(downscale * patch * architecture.packs, control.multiple if control else 1),
        default_size=(height * downscale, width * downscale),
        is_told_guidance=bool(network.config.get("time_cond_proj_dim") or network.config.get("guidance_embeds")),
        control=None if control is None else control.kind,
        condition_encoder=None if control is None else control.encoder,
        features=() if control is None else control.features,
        any_multiple=_any_multiple(network, downscale, control) if architecture.network == "unet" else None,
        largest_side=(network.config.get("pos_embed_max_size") or 0) * patch * downscale or None,
    )


def _controlled(denoiser: Any, control: Control | None) -> torch.nn.Module:
    if control is not None:
        denoiser.control = control.network
    return denoiser


def _any_multiple(unet: Any, downscale: int, control: Control | None) -> int:
    """What sides must be a multiple of for every level of the network to be twice the next: else it upsamples to sizes of its
    own, in another graph."""
    return math.lcm(downscale * 2**unet.num_upsamplers, control.multiple if control else 1)


def _check_network(network: Any, architecture: Architecture) -> None:
    """Raises ArtifactError for a network that is told, or that gives, something else than its pipeline class passes on."""
    name, config = architecture.network, network.config
    for key, known in (
        ("class_embed_type", None),
        ("num_class_embeds", None),
        ("addition_embed_type", architecture.embedded),
    ):
        if config.get(key) != known:
            raise ArtifactError(
                f"the {name} is told more than its text ({key}={config.get(key)!r}); such networks are not read"
            )
    channels, given = config.in_channels, config.get("out_channels") or config.in_channels
    if given != channels and architecture.denoiser is not PixArt:
        raise ArtifactError(
            f"the {name} gives {given} channels for {channels}, a variance perhaps; only its prediction is drawn with"
        )


def _check_projection(unet: Any, pooled: int) -> None:
    """Raises ArtifactError for a UNet of XL's family that is told other numbers than size, crop and size again."""
    each, wanted = unet.config.addition_time_embed_dim, unet.config.projection_class_embeddings_input_dim
    if wanted != 6 * each + pooled:
        raise ArtifactError(
            f"the unet is told {(wanted - pooled) / each:g} numbers beside the text (projection_class_embeddings_input_dim="
            f"{wanted}), not size, crop and size again: a refiner is no text-to-image model"
        )


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


def _flux_text(p: Any) -> tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]:
    tokens = (
        TokenInput("input_ids", p.tokenizer, _clip_length(p), truncates=True),
        TokenInput("input_ids_2", p.tokenizer_2, _t5_length(p.transformer)),
    )
    return PooledAndT5Texts(p.text_encoder, p.text_encoder_2), tokens, (EMBEDDINGS, POOLED)


def _t5_length(transformer: Any) -> int:
    """What the cards say: 256 of schnell, 512 of those that are told a guidance scale."""
    return 512 if transformer.config.guidance_embeds else 256


def _sana_text(p: Any) -> tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]:
    """An instruction goes before every prompt: the pipeline's default. Of the tokens, the first and the last are read."""
    asked = inspect.signature(type(p).__call__).parameters
    prefix, kept = "\n".join(asked["complex_human_instruction"].default), asked["max_sequence_length"].default
    length = len(p.tokenizer.encode(prefix)) + kept - 2
    p.tokenizer.padding_side = "right"
    tokens = TokenInput("input_ids", p.tokenizer, length, mask="attention_mask", lowercase=True, prefix=prefix)
    return GemmaText(p.text_encoder, kept), (tokens,), (EMBEDDINGS, MASK)


def _pixart_text(length: int) -> Callable[[Any], tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]]:
    def text(p: Any) -> tuple[torch.nn.Module, tuple[TokenInput, ...], tuple[str, ...]]:
        tokens = TokenInput("input_ids", p.tokenizer, length, mask="attention_mask", lowercase=True)
        return T5Text(p.text_encoder), (tokens,), (EMBEDDINGS, MASK)

    return text


def _pixart(length: int) -> Architecture:
    return Architecture("transformer", ("text_encoder", "tokenizer"), _pixart_text(length), PixArt)


def _with_control(plain: Architecture, part: str) -> Architecture:
    return replace(plain, parts=(*plain.parts, part), control=part)


_TWO = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_SD = Architecture("unet", ("text_encoder", "tokenizer"), _sd_text, lambda unet, size: UNet(unet))
_SDXL = Architecture("unet", _TWO, _sdxl_text, UNetXL, ("latents_mean", "latents_std"), "text_time")
_SD3 = Architecture(
    "transformer",
    (*_TWO, "text_encoder_3", "tokenizer_3"),
    _sd3_text,
    lambda transformer, size: SD3(transformer),
    ("shift_factor",),
)
_FLUX = Architecture(
    "transformer",
    _TWO,
    _flux_text,
    lambda transformer, size: Flux(transformer, size, _t5_length(transformer), 8),
    ("shift_factor",),
    packs=2,
)
ARCHITECTURES: dict[str, Architecture] = {
    "StableDiffusionPipeline": _SD,
    "LatentConsistencyModelPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX,
    "SanaSprintPipeline": Architecture(
        "transformer", ("text_encoder", "tokenizer"), _sana_text, lambda transformer, size: Sana(transformer)
    ),
    "PixArtAlphaPipeline": _pixart(120),
    "PixArtSigmaPipeline": _pixart(300),
}
ARCHITECTURES |= {
    name: _with_control(ARCHITECTURES[f"{family}Pipeline"], PARTS[kind]) for (family, kind), name in PIPELINES.items()
}
