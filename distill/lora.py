"""A student as low-rank adapters (Hu et al. 2022, arXiv 2106.09685) on the teacher's own network, by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from torch import nn

from ..core.errors import RecipeError, missing_extra
from .models import Model
from .recipe import LoraSettings


def add_adapters(model: Model, settings: LoraSettings) -> Model:
    """The student: the model's network with adapters that train, in float32; without them it is the teacher still.

    Raises RecipeError for a class whose pipeline reads no LoRA and for targets that the network lacks.
    """
    name, network = model.stages.pipeline, model.network
    if not hasattr(network, "add_adapter") or not hasattr(model.pipeline, "save_lora_weights"):
        raise RecipeError(f"diffusers' {name} reads no LoRA; leave out 'lora'")
    try:
        from peft import LoraConfig
    except ImportError:
        raise missing_extra("peft", "train") from None
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,  # type: ignore[arg-type]
        target_modules=targets_in(network, settings.targets),
    )
    network.add_adapter(config)
    cast_training_params(network)
    return model


def targets_in(network: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """The modules that get an adapter: "attention" and "all" stand for those whose names or kind say so.

    Raises RecipeError for a name that no module ends with.
    """
    kinds = (nn.Linear, nn.Conv2d)
    names = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    if targets == "all":
        return names
    if targets == "attention":
        return [name for name in names if ".attn" in name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            some = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise RecipeError(f"lora.targets: the network has no {target!r}; its layers end with {', '.join(some)}")
    return list(targets)


class WithoutAdapters(nn.Module):
    """A denoiser's network that adapters were added to, as it is without them: the teacher, of the same weights."""

    def __init__(self, denoiser_network: Any, network: Any) -> None:
        super().__init__()
        for name in ("unet", "transformer"):  # where features are read
            if hasattr(denoiser_network, name):
                setattr(self, name, getattr(denoiser_network, name))
        self._both = (denoiser_network, network)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        denoiser_network, network = self._both
        with without_adapters(network):
            return denoiser_network(*args)


@contextmanager
def without_adapters(network: Any) -> Iterator[None]:
    """The network without its adapters, and where a gradient runs through it without checkpointing: a recomputation in the
    backward pass would find the adapters again. peft's own switch also freezes them, which a graph may not survive."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    checkpointing = torch.is_grad_enabled() and getattr(network, "is_gradient_checkpointing", False)
    if checkpointing:
        network.disable_gradient_checkpointing()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        if checkpointing:
            network.enable_gradient_checkpointing()


def save_adapters(model: Model, folder: Path) -> None:
    """Write the file that `pipe.load_lora_weights(folder)` takes, with rank and alpha inside."""
    from peft import get_peft_model_state_dict

    part = "unet" if hasattr(model.pipeline, "unet") else "transformer"
    weights = {name: value.cpu() for name, value in get_peft_model_state_dict(model.network).items()}
    layers: dict[str, Any] = {f"{part}_lora_layers": weights, **_collate_lora_metadata({part: model.network})}
    type(model.pipeline).save_lora_weights(str(folder), **layers)
