"""LoRAs of FLUX in kohya's names: diffusers makes three pairs of factors of a fused layer, which must not hide those it drops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imagine_flash.core.errors import ArtifactError
from imagine_flash.pipelines.lora import Lora, fuse
from imagine_flash.pipelines.lora_names import converted_names
from imagine_flash.tests import architectures

Tensors = dict[str, torch.Tensor]
RANK, WIDTH = 4, 32
FUSED = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_txt_attn_qkv")


def pair(name: str, rows: int, columns: int = WIDTH, kinds: tuple[str, str] = ("lora_down", "lora_up")) -> Tensors:
    generator = torch.Generator().manual_seed(len(name))
    down, up = (0.1 * torch.randn(*shape, generator=generator) for shape in ((RANK, columns), (rows, RANK)))
    return {f"{name}.{kinds[0]}.weight": down, f"{name}.{kinds[1]}.weight": up}


def kohya(name: str, rows: int, columns: int = WIDTH) -> Tensors:
    return pair(name, rows, columns) | {f"{name}.alpha": torch.tensor(2.0 * RANK)}


@pytest.fixture
def tensors() -> Tensors:
    """What fits the tiny FLUX: both fused layers of its one block of two streams, and a layer of CLIP."""
    clip = kohya("lora_te1_text_model_encoder_layers_0_self_attn_out_proj", WIDTH)
    return {key: values for name in FUSED for key, values in kohya(name, 3 * WIDTH).items()} | clip


def fused(folder: Path, tensors: Tensors) -> Any:
    save_file(tensors, folder / "style.safetensors")
    pipeline = architectures.build_flux()
    with torch.inference_mode():  # as an export does
        fuse(pipeline, "transformer", Lora(str(folder / "style.safetensors")))
    return pipeline


def test_a_fused_layer_is_three(tmp_path: Path, tensors: Tensors) -> None:
    pipeline, before = fused(tmp_path, tensors), architectures.build_flux()
    change = 2.0 * tensors[f"{FUSED[0]}.lora_up.weight"] @ tensors[f"{FUSED[0]}.lora_down.weight"]
    for name, expected in zip(("to_q", "to_k", "to_v"), change.chunk(3), strict=True):
        now, old = (getattr(one.transformer.transformer_blocks[0].attn, name).weight for one in (pipeline, before))
        torch.testing.assert_close(now, old + expected)
    assert len(converted_names(before, tensors)) == 2 * (3 + 3 + 1)


BESIDE: dict[str, tuple[Tensors, str]] = {
    "the last layer": (
        kohya("lora_unet_final_layer_linear", 16),
        r"proj_out\.lora_A\.weight has no place, only 14 of its 16",
    ),
    "T5": (
        kohya("lora_te2_encoder_block_0_layer_0_SelfAttention_q", 96, 96),
        r"its lora_te2_encoder_block_0_layer_0_SelfAttention_q\.lora_down\.weight has no place there",
    ),
    "a block that is not there": (
        kohya("lora_unet_double_blocks_9_img_attn_proj", WIDTH),
        r"transformer\.transformer_blocks\.9\.attn\.to_out\.0\.lora_A\.weight has no place, only 14 of its 16",
    ),
    "names of another script": (
        pair("transformer.transformer_blocks.0.attn.to_q", WIDTH, kinds=("lora_A", "lora_B")),
        r"its lora_te1_text_model_encoder_layers_0_self_attn_out_proj\.lora_down\.weight has no place there",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_dropped_is_named(name: str, tmp_path: Path, tensors: Tensors) -> None:
    """They were fused without a word: the pairs that fused layers are split into made up the number."""
    more, says = BESIDE[name]
    with pytest.raises(ArtifactError, match=says) as caught:
        fused(tmp_path, tensors | more)
    assert "\n" not in str(caught.value)
