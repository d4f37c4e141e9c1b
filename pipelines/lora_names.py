"""What diffusers makes of the tensors of a LoRA that are not called as its networks are, such as those of kohya's scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .stages import quiet

ALPHA = "alpha"  # the end of the names that say how strong the factors are


def converted_names(reader: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names in diffusers of the factors that it converts a LoRA's tensors to. ValueError that names a tensor which is in none
    of them: FLUX's converter leaves out what it does not know, while of one fused layer it makes three.

    reader: a pipeline that loads LoRAs. Which are left out is found by differentiation, since the converter scales and splits.
    """
    with torch.inference_mode(False), torch.enable_grad(), quiet():
        ones = {name: torch.ones((), dtype=torch.bfloat16, requires_grad=True) for name in tensors if _is_factor(name)}
        traced = {
            name: ones[name].expand(values.shape).clone() if name in ones else values.clone()
            for name, values in tensors.items()
        }
        converted = {name: values for name, values in _convert(reader, traced).items() if _is_factor(name)}
        reached = [values.sum() for values in converted.values() if values.requires_grad]
        slopes = torch.autograd.grad(reached, list(ones.values()), allow_unused=True) if reached else [None] * len(ones)
    for name, slope in zip(ones, slopes, strict=True):
        if slope is None:
            raise ValueError(f"its {name} has no place there")
    return list(converted)


def _is_factor(name: str) -> bool:
    return not name.endswith(ALPHA)


def _convert(reader: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the pipeline's load_lora_weights does first: only that of XL knows its UNet's blocks by other names too."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    is_xl = StableDiffusionXLLoraLoaderMixin in type(reader).__mro__
    found = reader.lora_state_dict(tensors, **({"unet_config": reader.unet.config} if is_xl else {}))
    return found[0] if isinstance(found, tuple) else found
