"""The networks of each pipeline class as modules of plain tensors: text encoders, and denoisers asked as the class asks them."""

from __future__ import annotations

from typing import Any

import torch

from ..folders.manifests import Size

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
        self.told_size = bool(transformer.use_additional_conditions)
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
