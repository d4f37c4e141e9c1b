"""Rendered scenes as latents, encoded once and kept: the encoder and the renderer then cost a training nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track

from ..reproducible import fingerprint
from .emoji import EmojiScenes
from .kept import kept
from .rendering import rendered

if TYPE_CHECKING:
    from ..models import Model

_BATCH = 100


def encoder_weights(model: Model) -> str:
    """A SHA-256 of what makes latents of pictures: weights, and how the network takes them scaled and shifted."""
    vae, encoder = model.pipeline.vae, model.stages.image_encoder
    parts = [vae.encoder, *filter(None, [getattr(vae, "quant_conv", None)])]
    numbers = [*(value for part in parts for value in part.state_dict().values()), encoder.scale, encoder.shift]
    plain = (each.detach().cpu().contiguous().flatten().view(torch.uint8) for each in numbers)  # NumPy has no bfloat16
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in plain)).hexdigest()


@torch.no_grad()
def encoded_scenes(
    model: Model,
    path: Path,
    *,
    seed: int,
    size: int,
    count: int,
    font: Path | None = None,
    console: Console | None = None,
) -> torch.Tensor:
    """Latents (count, C, h, w) float16 of the first scenes of a seed, kept in `path` and used again while nothing changed."""
    weights, device = encoder_weights(model), model.pipeline.vae.device
    scenes = EmojiScenes(seed=seed, size=size, font=font)
    probe = hashlib.sha256(
        b"".join(scenes[i].image.tobytes() for i in range(8))
    ).hexdigest()  # another font, other pictures

    def encoded() -> dict[str, torch.Tensor]:
        groups = rendered(scenes, count, batch=_BATCH)
        batches = track(groups, "encoding scenes", -(-count // _BATCH), console=console or Console(stderr=True))
        encode = model.stages.image_encoder
        return {"latents": torch.cat([encode(torch.from_numpy(images).to(device)).half().cpu() for images in batches])}

    return kept(path, fingerprint(weights, probe, count), encoded)["latents"]
