"""The stages of a student as torch modules, with the inputs and outputs that the exported graphs have."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..core.errors import ArtifactError, missing_extra
from ..core.schedule import prediction_type_of
from ..folders.manifests import Guidance
from ..folders.sizes import AnySize, Size, size_name

try:
    import torch
except ImportError:
    raise missing_extra("torch", "export") from None

IMAGES, FINITE, LATENTS, GUIDANCE = "images", "finite", "latents", "guidance"
CONDITION, CONDITION_SCALE = "condition", "condition_scale"
PROBE = 8  # latents of a side: enough for any decoder, cheap for all


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in `dtype`; where they are, no operator is traced."""
    return values if values.dtype == dtype else values.to(dtype)


class AllFinite(torch.nn.Module):
    """Float tensors (B, ...) -> bool (B,): whether an image has neither NaN nor Inf in any of them.

    By the mean of the sizes, since a mean hands NaN and Inf on, which a maximum does not on every processor.
    """

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        means = [cast(each, torch.float32).abs().flatten(1).mean(1) for each in values]  # (B,)
        return torch.stack(means).sum(0) < float("inf")


class Decoder(torch.nn.Module):
    """latents float32 (B, C, h, w) -> images uint8 (B, H, W, 3): unscale, decode, [-1, 1] to 0..255, round half to even;
    and finite bool (B,): whether the latents and what was decoded hold neither NaN nor Inf. Some networks (ReLU, tanh) make
    a picture of NaN or Inf, and bytes show neither.

    The unscaling is z / scaling_factor, with the pipeline class's `vae_fields` of vae.config: + shift_factor; or z std /
    scaling_factor + mean with latents_mean and latents_std. The vae computes in its own dtype, all else in float32.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, vae: Any, vae_fields: Collection[str] = ()) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        known = {key: vae.config.get(key) for key in vae_fields}
        mean, std = known.get("latents_mean"), known.get("latents_std")
        per_channel = mean is not None and std is not None
        shift = torch.tensor(mean if per_channel else [float(known.get("shift_factor") or 0.0)])
        scale = torch.tensor(std if per_channel else [1.0]) / self.scaling_factor
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.reshape(1, -1, 1, 1), persistent=False)
        self.shifted = bool(shift.any())
        self.all_finite = AllFinite()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [-1, 1], in the vae's dtype."""
        z = latents * self.scale
        if self.shifted:
            z = z + self.shift
        return self.vae.decode(cast(z, self.vae.dtype), return_dict=False)[0]

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = self.decode(latents)
        pixels = (cast(decoded, torch.float32) * 127.5 + 127.5).clamp(0.0, 255.0).round()
        return pixels.permute(0, 2, 3, 1).to(torch.uint8), self.all_finite(latents, decoded)


class ImageEncoder(torch.nn.Module):
    """images uint8 (B, H, W, 3) -> latents float32 (B, C, h, w), as the denoiser takes them: the decoder's counterpart.

    The mean where the vae gives a distribution.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.vae = decoder.vae
        self.register_buffer("scale", decoder.scale, persistent=False)
        self.register_buffer("shift", decoder.shift, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1.0
        encoded = self.vae.encode(cast(pixels, self.vae.dtype))
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        return (cast(z, torch.float32) - self.shift) / self.scale


@dataclass(frozen=True)
class TokenInput:
    """One tokenizer and the inputs of the text encoder that it feeds.

    tokenizer: of transformers, with a backend of `tokenizers`. length: prompts are padded to it. mask: the name of the
    input that takes the attention mask, if any. truncates: a longer prompt is cut, since another encoder reads all of it.
    lowercase: the pipeline lowers and strips the prompt first; prefix: and writes this before it.
    """

    name: str
    tokenizer: Any
    length: int
    mask: str | None = None
    truncates: bool = False
    lowercase: bool = False
    prefix: str = ""

    def text(self, prompt: str) -> str:
        """What is tokenized of a prompt."""
        return self.prefix + (prompt.lower().strip() if self.lowercase else prompt)

    def encode(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """int64 (B, L) by input name, as the diffusers pipeline computes them."""
        encoded = self.tokenizer(
            [self.text(prompt) for prompt in prompts], padding="max_length", max_length=self.length, truncation=True
        )
        found = {self.name: torch.tensor(encoded.input_ids)}
        return found | ({self.mask: torch.tensor(encoded.attention_mask)} if self.mask else {})


@dataclass(frozen=True)
class Stages:
    """A student's networks, in evaluation mode, on the CPU, and what the graphs' shapes follow from.

    text_encoder(*ids and masks) -> one tensor per name in `conditions`; denoiser(size)(latents, timestep, *conditions)
    -> m, with a guidance scale (B,) behind the conditions if is_told_guidance; decoder(latents) -> images, finite;
    image_encoder(images) -> latents. With a ControlNet or T2I-adapter, condition_encoder(condition) -> one tensor per name in
    `features`, and these and a scale (B,) stand behind the denoiser's other inputs. Every tensor is batched; text encoder and
    denoiser take and give their own dtype, float32 for an export.
    """

    pipeline: str  # diffusers' class
    tokens: tuple[TokenInput, ...]
    text_encoder: torch.nn.Module
    conditions: tuple[str, ...]
    denoiser: Callable[[Size | None], torch.nn.Module]  # for images of that size (None: any), which some are told
    decoder: Decoder
    image_encoder: ImageEncoder
    scheduler: dict[str, Any]
    latent_channels: int
    downscale: int  # pixels of an image's side per latent
    multiple: int  # what the sides of an image must be a multiple of
    default_size: Size
    is_told_guidance: bool = False
    control: str | None = None  # diffusers' class of the network that reads a conditioning picture
    condition_encoder: torch.nn.Module | None = None
    features: tuple[str, ...] = ()
    any_multiple: int | None = None  # as `multiple`, of a graph of any size; None: the networks have none
    largest_side: int | None = None  # of an image; None: there is no limit

    @property
    def prediction_type(self) -> str:
        """What the denoiser's m is."""
        return prediction_type_of(self.scheduler)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image of `size`."""
        return self.latent_channels, size[0] // self.downscale, size[1] // self.downscale

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """int64 (B, L) for every input of the text encoder, in its order."""
        return {name: ids for tokens in self.tokens for name, ids in tokens.encode(prompts).items()}

    def guidance(self, described: Guidance) -> Guidance:
        """What a student's manifest says of guidance, with what its network shows of it."""
        return described.model_copy(update={"embedded": self.is_told_guidance})

    def beside(self, condition: torch.Tensor, guidance: float, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """What the denoiser takes beside the text, by name. condition: uint8 (B, H, W, 3), read where there is control."""
        rows = len(condition)
        told = {GUIDANCE: torch.full((rows,), guidance)} if self.is_told_guidance else {}
        if self.condition_encoder is not None:
            told |= dict(zip(self.features, self.condition_encoder(condition), strict=True))
            told[CONDITION_SCALE] = torch.full((rows,), scale)
        return told

    def example_tokens(self, batch: int) -> dict[str, torch.Tensor]:
        """The tokens of a short prompt, `batch` times."""
        return self.encode_prompts(["a"] * batch)

    def check_size(self, size: Size) -> None:
        """Raises ArtifactError for a size that the networks cannot draw."""
        if min(size) < self.multiple or size[0] % self.multiple or size[1] % self.multiple:
            near = [max(1, round(side / self.multiple)) * self.multiple for side in size]
            raise ArtifactError(
                f"a size must be a multiple of {self.multiple} for this student, got {size_name(size)}; "
                f"try {size_name((near[0], near[1]))}"
            )
        if self.largest_side is not None and max(size) > self.largest_side:
            raise ArtifactError(
                f"a size must be at most {size_name((self.largest_side, self.largest_side))} for this student, whose network knows "
                f"no places beyond, got {size_name(size)}"
            )

    def any_size(self, limits: tuple[int, int]) -> AnySize:
        """What one set of graphs draws between these sides. Raises ArtifactError for what the networks cannot."""
        multiple, (low, high) = self.any_multiple, limits
        if multiple is None:
            raise ArtifactError(
                f"the network of a {self.pipeline} has its size built in, so there is no graph of any size; name the sizes: "
                "--sizes 512x512,768x512"
            )
        if not low < high or low % multiple or high % multiple:
            smallest = max(1, low // multiple)
            near = f"{smallest * multiple}-{max(smallest + 1, -(-high // multiple)) * multiple}"
            raise ArtifactError(
                f"any_size must run upwards in multiples of {multiple} for this student, got {low}-{high}; try {near}"
            )
        return AnySize(smallest=low, largest=high, multiple=multiple)


def downscale_of(decoder: Decoder, latent_channels: int) -> int:
    """Pixels of an image's side per latent, found by decoding a small latent. Raises ArtifactError if channels differ."""
    with torch.inference_mode():
        try:
            images, _ = decoder(torch.zeros(1, latent_channels, PROBE, PROBE))  # (1, H, W, 3)
        except RuntimeError as error:
            raise ArtifactError(
                f"the decoder does not take latents of {latent_channels} channels ({str(error).splitlines()[0]}); "
                "choose the one that belongs to this student"
            ) from None
    return images.shape[1] // PROBE


@contextmanager
def quiet(*, diffusers_warns: bool = False) -> Iterator[None]:
    """Silences the libraries' notes (missing torchvision, deprecated names, progress bars) while we call them.

    diffusers_warns: its warnings are heard, where they tell what was left out.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    levels_of_hub = (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity())
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    (diffusers_logging.set_verbosity_warning if diffusers_warns else diffusers_logging.set_verbosity_error)()
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
