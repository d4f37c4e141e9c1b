"""Everything of a teacher before it has learned anything: tokenizer, text encoder, UNet, schedule, by a recipe's sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ..core.errors import RecipeError
from ..core.plan import StepPlan
from ..core.update import update_table
from ..pipelines.stages import quiet
from .data.emoji import caption_at
from .data.vocabulary import all_words
from .models import Model, model_of
from .recipe import TeacherRecipe
from .tokenizer import train_tokenizer


def build_text_encoder(recipe: TeacherRecipe, tokenizer: Any) -> CLIPTextModel:
    """An untrained CLIP text encoder of the recipe's sizes."""
    sizes = recipe.network
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        projection_dim=sizes.text_width,
        max_position_embeddings=sizes.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(recipe: TeacherRecipe) -> UNet2DConditionModel:
    """An untrained UNet of the recipe's sizes."""
    sizes = recipe.network
    down = tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in sizes.attention)
    up = tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in sizes.attention[::-1])
    return UNet2DConditionModel(
        sample_size=recipe.image_size // 8,
        in_channels=recipe.autoencoder.latent_channels,
        out_channels=recipe.autoencoder.latent_channels,
        block_out_channels=sizes.channels,
        layers_per_block=sizes.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,
        norm_num_groups=sizes.norm_groups,
    )


def build_scheduler(recipe: TeacherRecipe) -> DDIMScheduler:
    """Stable Diffusion's schedule by default; trailing steps that start at T and end on x0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=recipe.beta_start,
        beta_end=recipe.beta_end,
        beta_schedule=recipe.beta_schedule,
        prediction_type=recipe.prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=recipe.rescale_betas_zero_snr,
    )


def build_model(recipe: TeacherRecipe, autoencoder: AutoencoderTiny) -> Model:
    """Everything untrained around `autoencoder`. RecipeError for sizes or a schedule that cannot work."""
    tokenizer = _tokenizer(recipe.seed, recipe.network.context)
    torch.manual_seed(recipe.seed + 1)
    try:
        scheduler: Any = build_scheduler(recipe)
        text_encoder, unet = build_text_encoder(recipe, tokenizer), build_unet(recipe)
        with quiet():
            parts: dict[str, Any] = {
                "vae": autoencoder,
                "text_encoder": text_encoder,
                "tokenizer": tokenizer,
                "unet": unet,
            }
            without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
            pipeline = StableDiffusionPipeline(**parts, **without, scheduler=scheduler, requires_safety_checker=False)
        model = model_of(pipeline)
        update_table(model.denoiser.schedule, StepPlan.trailing(1), recipe.prediction_type)
    except Exception as error:  # each library refuses sizes with errors of its own
        reason = str(error).strip().splitlines()[-1].strip()
        raise RecipeError(f"the recipe's network or schedule does not fit together: {reason}") from None
    return model


@lru_cache(4)
def _tokenizer(seed: int, context: int) -> Any:
    captions = [caption_at(seed, i, strange_words=0.0)[1].text for i in range(20_000)]
    captions += all_words() * 3  # the rarest plural has a token of its own, too
    return train_tokenizer(captions, context=context)
