"""Students of real shapes with random weights: neither speed nor memory depends on what the weights are.

The tokenizer knows a few words; its ids are a small part of CLIP's.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..core.plan import StepPlan
from ..distill.tokenizer import END, START, train_tokenizer
from ..folders.manifests import StudentManifest
from ..folders.reading import write_manifest

Shape = Literal["tiny", "sd15", "sd-turbo", "pixart", "sdxl"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
WORDS = "a red fox cat boat house star on pink blue"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# Every library knows this sampler; v-prediction since a random network's epsilon, divided by alpha_999, is far off the latents
SCHEDULER = {
    **BETAS,
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
CLIP_VOCABULARY = 49408


def networks_of(shape: Shape) -> dict[str, Any]:
    """By the names of diffusers' components, on the device of the context.

    sd15: a UNet of 860 M parameters, a text encoder of 123 M; sd-turbo: 866 M, OpenCLIP's text encoder of 340 M; sdxl: a UNet
    of 2.6 G, text encoders of 123 M and 695 M; pixart: a DiT of 611 M, T5-XXL's encoder of 4.8 G; tiny: to try a benchmark.
    """
    from diffusers import UNet2DConditionModel

    if shape == "tiny":
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=32,
        )
        return {"unet": unet, "text_encoder": _clip(32, layers=2, heads=4), "vae": _vae(0.18215, (32, 32, 32, 32))}
    if shape == "pixart":
        return {"transformer": _dit(), "text_encoder": _t5(), "vae": _vae(0.13025)}
    if shape == "sd15":
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        return {"unet": unet, "text_encoder": _clip(768, layers=12, heads=12), "vae": _vae(0.18215)}
    if shape == "sd-turbo":
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        return {"unet": unet, "text_encoder": _clip(1024, layers=23, heads=16), "vae": _vae(0.18215)}
    texts = {"text_encoder": _clip(768, layers=12, heads=12), "text_encoder_2": _clip(1280, 32, 20, projection=1280)}
    return {"unet": _xl_unet(), "vae": _vae(0.13025), **texts}


def _xl_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def random_student(
    folder: Path, shape: Shape, *, steps: tuple[int, ...] = (1, 2, 3), tiny_decoder: bool = False
) -> int:
    """Writes a student folder in float16, component by component; returns its number of parameters.

    steps: of its plans; tiny_decoder: an AutoencoderTiny instead of the KL autoencoder.
    """
    from diffusers import AutoencoderTiny, DDIMScheduler

    with torch.device("meta"):
        parts = networks_of(shape)
        if tiny_decoder:
            parts["vae"] = AutoencoderTiny()
    name = {"sdxl": "StableDiffusionXLPipeline", "pixart": "PixArtAlphaPipeline"}.get(shape, "StableDiffusionPipeline")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU draws billions of numbers in no time
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": "0.42.1"}
    total = 0
    for name, module in parts.items():
        total += sum(p.numel() for p in module.parameters())
        filled: Any = _random_weights(module.to_empty(device=device)).half()
        filled.cpu().save_pretrained(folder / name)
        index[name] = [module.__module__.split(".")[0], type(module).__name__]
    prediction = {"prediction_type": "epsilon"} if shape == "pixart" else {}  # its network also gives a variance
    DDIMScheduler(**{**SCHEDULER, **prediction}).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    for suffix in ("", "_2") if "text_encoder_2" in parts else ("",):
        tokenizer = _t5_tokenizer() if shape == "pixart" else train_tokenizer([WORDS] * 2, context=77)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        index[f"tokenizer{suffix}"] = ["transformers", "T5Tokenizer" if shape == "pixart" else "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    plans = {n: list(StepPlan.trailing(n).timesteps) for n in steps}
    write_manifest(folder, StudentManifest(plans=plans, noise_correction=False, recipe={}, teacher_sha256="0" * 64))
    return total


def _clip(hidden: int, layers: int, heads: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    marks = train_tokenizer([WORDS] * 2, context=77).get_vocab()
    config = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=projection or hidden,
        hidden_act="gelu",
        bos_token_id=marks[START],
        eos_token_id=marks[END],
        pad_token_id=marks[END],
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _dit() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=64, num_layers=28, caption_channels=4096, cross_attention_dim=1152, out_channels=8
    )


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -4.0),
        *((letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _vae(scaling_factor: float, widths: tuple[int, ...] = (128, 256, 512, 512)) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=scaling_factor,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Matrices of variance 1 / fan-in, norms of one, biases of zero: signals keep their size through the network."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float(name.endswith("weight")))
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module
