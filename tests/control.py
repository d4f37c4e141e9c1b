"""Tiny random ControlNets and T2I-adapters for the pipelines of pipelines.py and architectures.py, and pictures that they read."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 64  # pixels of the tiny pipelines' pictures


def randomised(network: Any, seed: int = 11, size: float = 0.05) -> Any:
    """A new network with random numbers everywhere, in the convolutions that training begins at zero too."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for values in network.parameters():
        values.data = values.data + size * torch.randn(values.shape, generator=generator)
    return network.eval()


def build_controlnet(unet: Any, **config: Any) -> Any:
    """A ControlNet of a UNet's form."""
    import torch
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    network = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 8, 8, 8), load_weights_from_unet=False
    )
    if config:
        known = {key: value for key, value in network.config.items() if key != "_use_default_values"}
        network = ControlNetModel.from_config({**known, **config})
    return randomised(network)


def build_adapter(unet: Any, **config: Any) -> Any:
    """A T2I-adapter whose feature maps have the sizes that the UNet adds them at."""
    import torch
    from diffusers import T2IAdapter

    torch.manual_seed(4)
    plain_first = "CrossAttn" not in unet.config.down_block_types[0]
    kind: dict[str, Any] = {"adapter_type": "full_adapter_xl" if plain_first else "full_adapter"}
    kind |= {"downscale_factor": 16 if plain_first else 8, "num_res_blocks": 1}
    return randomised(T2IAdapter(channels=list(unet.config.block_out_channels), **{**kind, **config}))


BUILDERS = {"controlnet": build_controlnet, "adapter": build_adapter}


def saved(network: Any, folder: Path) -> Path:
    """As diffusers saves it."""
    network.save_pretrained(folder)
    return folder


def picture(seed: int = 0, side: int = SIDE) -> NDArray[np.uint8]:
    """Coloured squares with sharp edges: what a conditioning picture looks like to a network, (side, side, 3)."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return squares.repeat(side // 8, 0).repeat(side // 8, 1)
