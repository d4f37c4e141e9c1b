"""A pipeline as one file, under the names that Stable Diffusion's first code gave its tensors and that people still share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

RESNET = {  # diffusers' names by those of the file, of the UNet
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {  # of the tiny UNet: two levels, attention in the second
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
VAE = (  # patterns, and what they become
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
)


def write_checkpoint(pipeline: Any, path: Path) -> Path:
    """A tiny StableDiffusionPipeline, in float16."""
    from safetensors.torch import save_file

    text = {name.removeprefix("text_model."): tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    found = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
    found |= {f"model.diffusion_model.{_unet(name)}": tensor for name, tensor in pipeline.unet.state_dict().items()}
    for name, tensor in pipeline.vae.state_dict().items():
        found[f"first_stage_model.{_vae(name)}"] = tensor
    save_file({name: tensor.contiguous().half() for name, tensor in found.items()}, path)
    return path


def _unet(name: str) -> str:
    block = next(known for known in UNET if name.startswith(f"{known}."))
    rest = name.removeprefix(f"{block}.")
    if ".resnets." in block:
        part = rest.partition(".")
        rest = f"{RESNET[part[0]]}.{part[2]}"
    return f"{UNET[block]}.{rest}"


def _vae(name: str) -> str:
    def up(found: re.Match[str]) -> str:
        return f"up.{3 - int(found[1])}."

    name = re.sub(r"up_blocks\.(\d)\.", up, name).replace("upsamplers.0", "upsample")
    name = re.sub(r"(up\.\d)\.resnets\.(\d)", r"\1.block.\2", name)
    for pattern, new in VAE:
        name = re.sub(pattern, new, name)
    return name
