"""The networks of each pipeline class as modules of plain tensors: text encoders, and denoisers asked as the class asks them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ..folders.sizes import Size
from .stages import cast

Conditions = tuple[torch.Tensor, ...]


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


class GuidanceEmbedding(torch.nn.Module):
    """guidance w float32 (B,) -> (B, D), as diffusers' pipelines compute it: sines and cosines of 1000 (w - 1) f, where the
    frequencies f fall from 1 to 1/10000 (get_guidance_scale_embedding; Meng et al. 2023, section 3)."""

    frequencies: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        exponents = torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1))
        self.register_buffer("frequencies", 1000.0 * exponents.exp(), persistent=False)
        self.odd = width % 2

    def forward(self, guidance: torch.Tensor) -> torch.Tensor:
        angles = (guidance - 1.0)[:, None] * self.frequencies
        return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.odd))


class UNet(torch.nn.Module):
    """latents (B, C, h, w), timestep float32 (B,), embeddings (B, L, D) -> m (B, C, h, w). more: guidance float32 (B,) of a network
    that is told a scale (time_cond_proj_dim); then what a ControlNet or T2I-adapter reads, if one is its `control`."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        width = unet.config.get("time_cond_proj_dim")
        self.guidance_embedding = GuidanceEmbedding(width) if width else None
        self.control: torch.nn.Module | None = None

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        return self._ask(latents, timestep, embeddings, more)

    def _ask(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, more: Conditions, **added: Any
    ) -> torch.Tensor:
        told = {}
        if self.guidance_embedding is not None and more:
            guidance, *rest = more
            told, more = (
                {"timestep_cond": cast(self.guidance_embedding(cast(guidance, torch.float32)), latents.dtype)},
                (*rest,),
            )
        if self.control is not None:  # which is not told the guidance, as in diffusers
            told |= self.control(latents, timestep, embeddings, more, **added)
        return self.unet(latents, timestep, embeddings, return_dict=False, **added, **told)[0]


class UNetXL(UNet):
    """As UNet, with pooled (B, P); the network is told the image's size, uncropped. size: None takes that of the latents."""

    time_ids: torch.Tensor | None
    downscale = 8  # pixels of an image's side per latent

    def __init__(self, unet: Any, size: Size | None) -> None:
        super().__init__(unet)
        told = None if size is None else torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
        self.register_buffer("time_ids", told, persistent=False)

    def forward(  # type: ignore[override]
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeddings: torch.Tensor,
        pooled: torch.Tensor,
        *more: torch.Tensor,
    ) -> torch.Tensor:
        time_ids = self._size_of(latents) if self.time_ids is None else self.time_ids.expand(latents.shape[0], -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self._ask(latents, timestep, embeddings, more, added_cond_kwargs=added)

    def _size_of(self, latents: torch.Tensor) -> torch.Tensor:
        """What it is told of its picture: height, width, no crop, height, width, float32 (B, 6)."""
        rows, _, height, width = latents.shape
        to = {"dtype": torch.float32, "device": latents.device}
        sides = [torch.full((rows, 1), side * self.downscale, **to) for side in (height, width)]
        return torch.cat([*sides, torch.zeros((rows, 2), **to), *sides], dim=1)


class PixArt(torch.nn.Module):
    """As UNet, with attention_mask (B, L); of a network that also predicts a variance, the mean alone. size: as of UNetXL."""

    resolution: torch.Tensor
    aspect_ratio: torch.Tensor
    downscale = 8

    def __init__(self, transformer: Any, size: Size | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.learned_sigma = transformer.config.out_channels == 2 * transformer.config.in_channels
        self.told_size, self.any_size = bool(transformer.use_additional_conditions), size is None
        height, width = size or (1, 1)
        self.register_buffer("resolution", torch.tensor([[height, width]], dtype=torch.float32), persistent=False)
        self.register_buffer("aspect_ratio", torch.tensor([[height / width]]), persistent=False)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        told = {"resolution": self.resolution, "aspect_ratio": self.aspect_ratio}
        if self.any_size:
            sides = torch.tensor([latents.shape[-2:]], dtype=torch.float32, device=latents.device)
            told = {"resolution": sides * self.downscale, "aspect_ratio": sides[:, :1] / sides[:, 1:]}
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


class PooledAndT5Texts(torch.nn.Module):
    """Two ids -> embeddings (B, L, D) of T5, pooled (B, P) of a CLIP without projection (FLUX)."""

    def __init__(self, clip: torch.nn.Module, t5: torch.nn.Module) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> Conditions:
        return self.t5(input_ids_2)[0], self.clip(input_ids).pooler_output


class Flux(torch.nn.Module):
    """As UNet, with pooled (B, P). The network reads 2x2 latents as one token, and the places of all tokens as angles, which
    only the size decides: computed here, once, in the float64 that diffusers takes, which not every runtime has."""

    def __init__(self, transformer: Any, size: Size, text_length: int, downscale: int) -> None:
        super().__init__()
        self.rows, self.columns = size[0] // downscale // 2, size[1] // downscale // 2
        places = torch.zeros(self.rows, self.columns, 3)
        places[..., 1] += torch.arange(self.rows)[:, None]
        places[..., 2] += torch.arange(self.columns)[None]
        self.register_buffer("text_places", torch.zeros(text_length, 3), persistent=False)
        self.register_buffer("places", places.flatten(0, 1), persistent=False)
        angles = transformer.pos_embed(torch.cat([self.text_places, self.places]))  # type: ignore[list-item]
        self.transformer = copy.copy(transformer)  # the same weights
        self.transformer._modules = {**transformer._modules, "pos_embed": _Known(*angles)}

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeddings: torch.Tensor,
        pooled: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, channels = latents.shape[:2]
        packed = latents.view(batch, channels, self.rows, 2, self.columns, 2).permute(0, 2, 4, 1, 3, 5)
        m = self.transformer(
            hidden_states=packed.reshape(batch, self.rows * self.columns, 4 * channels),
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            timestep=timestep / 1000,
            guidance=guidance,
            txt_ids=self.text_places,
            img_ids=self.places,
            return_dict=False,
        )[0]
        unpacked = m.view(batch, self.rows, self.columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return unpacked.reshape(latents.shape)


class GemmaText(torch.nn.Module):
    """input_ids, attention_mask (B, L) -> embeddings (B, K, D), attention_mask float32 (B, K): of the first token and the last
    K - 1, behind an instruction that all prompts share (SANA)."""

    def __init__(self, text_encoder: torch.nn.Module, kept: int) -> None:
        super().__init__()
        self.text_encoder, self.kept = text_encoder, kept

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Conditions:
        embeddings = self.text_encoder(input_ids, attention_mask=attention_mask)[0]
        ends = (torch.cat([all_[:, :1], all_[:, 1 - self.kept :]], dim=1) for all_ in (embeddings, attention_mask))
        chosen, mask = ends
        return chosen, mask.to(torch.float32)


class Sana(torch.nn.Module):
    """As UNet, with attention_mask (B, L). Of SANA-Sprint, whose state of angles cos(t) x0 + sin(t) eps is that of a flow but
    for its length: diffusers' pipeline stretches it to the flow's before it asks the network, and its m back."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.scale = float(transformer.config.guidance_embeds_scale)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.transformer(
            latents,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=attention_mask,
            guidance=None if guidance is None else cast(guidance * self.scale, latents.dtype),
            timestep=timestep / 1000,
            return_dict=False,
        )[0]


class _Known(torch.nn.Module):
    """Gives the same tensors whatever it is asked."""

    def __init__(self, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def forward(self, _: torch.Tensor) -> tuple[Any, Any]:
        return self.cosines, self.sines
