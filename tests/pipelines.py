"""Small random pipelines of the real classes, with fixed seeds: what the tests export and draw with.

A module, not fixtures, so that any test may build one: `from imagine_flash.tests.pipelines import build_student`.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
from __future__ import annotations

from pathlib import Path
from typing import Any

CAPTIONS = (
    "a fox on a pink background",
    "a cat to the left of a dog",
    "a rocket above a house on a blue background",
    "cat on pink",
    "a dog below a fox",
)
CONTEXT_LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer():
    """A CLIP tokenizer (byte-level BPE, words end in </w>) that knows each word of CAPTIONS as one token.

    Merges are spelt out, letter by letter, longest word first: a trainer breaks ties differently from run to run.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    words = sorted({word for caption in CAPTIONS for word in caption.split()}, key=lambda word: (-len(word), word))
    merges = []
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        merges += [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
    merges = list(dict.fromkeys(merges))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [BOS, EOS, *alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    return tokenizer


def build_vae(kind: str, channels: int, latent_channels: int = 4):
    """An 8x autoencoder: "kl" (no post_quant_conv) or "tiny"; its decoder spans about [-1, 1] on unit latents."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(1)
    if kind == "tiny":
        widths = (channels,) * 4
        tiny = AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            latent_channels=latent_channels,
        )
        torch.nn.init.constant_(tiny.decoder.layers[-1].bias, 0.5)  # its images span 0..1 before the last scaling
        return tiny
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(channels,) * 4,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.5,
        use_post_quant_conv=False,
        use_quant_conv=False,
    )


def build_pipeline(*, vae: str = "kl", widths: tuple[int, int] = (16, 32), hidden: int = 32, layers: int = 2):
    """A whole StableDiffusionPipeline with random weights of unit-scale outputs."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=hidden,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    return StableDiffusionPipeline(
        vae=build_vae(vae, 16),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_student(folder: Path, *, half: bool = True, vae: str = "kl") -> Path:
    """Write a student folder (diffusers pipeline + imagine_flash.json) and return its path."""
    import torch

    pipeline = build_pipeline(vae=vae)
    pipeline.to(torch.float16 if half else torch.float32)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return describe(folder)


def describe(folder: Path, **fields: Any) -> Path:
    """Write the imagine_flash.json of a student whose weights lie in `folder` and return the folder."""
    from imagine_flash.core.plan import StepPlan
    from imagine_flash.folders.manifests import StudentManifest
    from imagine_flash.folders.reading import write_manifest

    values = {
        "plans": {steps: list(StepPlan.trailing(steps).timesteps) for steps in (1, 2, 3)},
        "known_words": sorted({word for caption in CAPTIONS for word in caption.split()}),
        "noise_correction": True,
        "recipe": {},
        "teacher_sha256": "0" * 64,
    } | fields
    write_manifest(folder, StudentManifest(**values))
    return folder
