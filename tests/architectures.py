"""Tiny random pipelines of the other classes that can be exported, as diffusers builds them; a module like pipelines.py."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
from __future__ import annotations

from pathlib import Path
from typing import Any

from .pipelines import CAPTIONS, CONTEXT_LENGTH, build_pipeline, build_tokenizer, build_vae, describe

WIDTH, PROJECTION, T5_WIDTH = 32, 16, 96


def build_t5_tokenizer() -> Any:
    """A T5 tokenizer (unigram, "▁" for spaces) that knows each word of CAPTIONS and every letter."""
    from transformers import T5Tokenizer

    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in words if len(word) > 1] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def build_clip(seed: int, *, projection: bool) -> Any:
    """A CLIP text model of two layers, with or without a projection."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def save_clip(folder: Path, size: int) -> Path:
    """A whole CLIP, of pictures of size x size and captions, with what prepares both."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer = build_tokenizer()
    common: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    words: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    text, vision = CLIPTextConfig(**common, **words), CLIPVisionConfig(**common, image_size=size, patch_size=4)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sides = {"height": size, "width": size}
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=sides).save_pretrained(folder)
    return folder


def build_t5(width: int) -> Any:
    """A T5 encoder of two layers."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(7)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(build_t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            feed_forward_proj="gated-gelu",
        )
    )


def build_sd21() -> Any:
    """Stable Diffusion 2.1: linear projections, attention heads by layer."""
    import torch
    from diffusers import UNet2DConditionModel

    pipeline = build_pipeline()
    torch.manual_seed(3)
    pipeline.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    )
    return pipeline


def build_sdxl() -> Any:
    """Two text encoders, pooled embeddings and the image's size as conditions."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + PROJECTION,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=build_vae("kl", 16),
        text_encoder=build_clip(1, projection=False),
        text_encoder_2=build_clip(2, projection=True),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def build_sd3() -> Any:
    """Three text encoders, a transformer of joint attention, rectified flow."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * PROJECTION,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae("kl", 16),
        text_encoder=build_clip(1, projection=True),
        tokenizer=build_tokenizer(),
        text_encoder_2=build_clip(2, projection=True),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=build_t5(T5_WIDTH),
        tokenizer_3=build_t5_tokenizer(),
    )


def build_pixart(sample_size: int = 8) -> Any:
    """One T5 with an attention mask, a DiT that also predicts a variance; of sample size 128 it is told the image's size."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return PixArtAlphaPipeline(
        tokenizer=build_t5_tokenizer(),
        text_encoder=build_t5(WIDTH),
        vae=build_vae("kl", 16),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


def build_flux() -> Any:
    """A CLIP for one vector, a T5 for the words, a transformer of packed latents whose places are angles."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = build_vae("kl", 16)
    vae.register_to_config(shift_factor=0.1)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=build_clip(1, projection=False),
        tokenizer=build_tokenizer(),
        text_encoder_2=build_t5(T5_WIDTH),
        tokenizer_2=build_t5_tokenizer(),
    )


def build_sana() -> Any:
    """SANA-Sprint: a Gemma that reads an instruction too, linear attention, a 32x autoencoder, a network told its guidance."""
    import torch
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    letters = [chr(i) for i in range(32, 127)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters, *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    torch.manual_seed(0)
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(pieces),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=8192,
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=2,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )
    return SanaSprintPipeline(tokenizer, text_encoder, vae, transformer, SCMScheduler())


def told_guidance(pipeline: Any) -> Any:
    """The same with a UNet that is told a guidance scale, as latent consistency models are, and their scheduler."""
    import torch
    from diffusers import LCMScheduler, UNet2DConditionModel

    torch.manual_seed(5)
    config = {key: value for key, value in pipeline.unet.config.items() if key != "_use_default_values"}
    pipeline.unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 32})
    pipeline.scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return pipeline


def build_lcm() -> Any:
    """A latent consistency model of Stable Diffusion's form."""
    from diffusers import LatentConsistencyModelPipeline

    parts = told_guidance(build_pipeline()).components
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


BUILDERS = {"sd15": build_pipeline, "sd21": build_sd21, "sdxl": build_sdxl, "sd3": build_sd3, "pixart": build_pixart}


DRAWN = {**BUILDERS, "flux": build_flux, "sana": build_sana}  # what is exported and drawn with, if not distilled


def build_student(kind: str, folder: Path) -> Path:
    """A student folder of that architecture, float16 weights."""
    import torch

    pipeline = DRAWN[kind]()
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return describe(folder, sampler={"kind": "deterministic"})
