"""Students of real shapes with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..core.plan import StepPlan
from ..folders.manifests import StudentManifest
from ..folders.reading import write_manifest

Shape = Literal["sd-turbo", "tiny"]
WORDS = ("a", "red", "fox", "cat", "boat", "house", "star", "on", "pink", "blue")
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
# of sd-turbo: the UNet and text encoder of Stable Diffusion 2.1, the decoder of all of them; tiny: to try the benchmark
UNETS: dict[str, dict[str, Any]] = {
    "sd-turbo": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
}
TEXT: dict[str, dict[str, Any]] = {
    "sd-turbo": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
WIDTHS = {"sd-turbo": (128, 256, 512, 512), "tiny": (32, 32, 32, 32)}  # of the decoder


def random_student(folder: Path, shape: Shape, *, tiny_decoder: bool) -> Path:
    """Writes a student folder in float16 with plans of 1 to 3 steps, and returns its path. tiny_decoder: AutoencoderTiny."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ..distill.tokenizer import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, context=77)
    make_unet: Any = UNet2DConditionModel
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text: Any = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **TEXT[shape], **marks)
    make_decoder: Any = AutoencoderTiny if tiny_decoder else AutoencoderKL
    blocks = (
        {}
        if tiny_decoder
        else {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": WIDTHS[shape],
            "layers_per_block": 2,
        }
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=make_decoder(latent_channels=4, **blocks),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=make_unet(in_channels=4, out_channels=4, **UNETS[shape]),
        scheduler=DDIMScheduler(**SCHEDULER),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    plans = {steps: list(StepPlan.trailing(steps).timesteps) for steps in (1, 2, 3)}
    described = StudentManifest(plans=plans, noise_correction=True, recipe={}, teacher_sha256="0" * 64)  # type: ignore[arg-type]
    write_manifest(folder, described)
    return folder
