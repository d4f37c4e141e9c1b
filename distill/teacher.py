"""`train-teacher`: tokenizer, text encoder, autoencoder and UNet from nothing, as a diffusers pipeline folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..core.errors import RecipeError
from ..core.plan import StepPlan
from ..core.schedule import NoiseSchedule
from ..core.update import update_table
from ..folders.files import atomic_folder, hash_folder, refuse_foreign
from .autoencoder import AutoencoderTask
from .data.captions import describe
from .data.emoji import EmojiScenes, caption_at, scene_at
from .data.latents import encoded_scenes
from .data.vocabulary import all_words
from .fit import fit, identify, seeded
from .grids import grid, to_pixels
from .networks import Networks, load_networks, noise_of, plain_attention
from .recipe import TeacherRecipe
from .tokenizer import train_tokenizer

PREVIEW_PROMPTS: tuple[str, ...] = (
    "a cat",
    "a fox on a pink background",
    "a rocket on blue",
    "an apple on a gray background",
    "a tree, green background",
    "a cat to the left of a dog",
    "a rocket above a house on a blue background",
    "an octopus below a star on purple",
)


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


def build_networks(recipe: TeacherRecipe, autoencoder: AutoencoderTiny) -> Networks:
    """Everything untrained around `autoencoder`. RecipeError for sizes or a schedule that cannot work."""
    captions = [caption_at(recipe.seed, i, strange_words=0.0)[1].text for i in range(20_000)]
    captions += all_words() * 3  # the rarest plural has a token of its own, too
    tokenizer = train_tokenizer(captions, context=recipe.network.context)
    torch.manual_seed(recipe.seed + 1)
    try:
        config = dict(build_scheduler(recipe).config)
        networks = Networks(
            tokenizer=tokenizer,
            text_encoder=build_text_encoder(recipe, tokenizer),
            unet=build_unet(recipe),
            vae=autoencoder,
            scheduler_config=config,
            schedule=NoiseSchedule.from_scheduler_config(config),
            prediction_type=recipe.prediction_type,
        )
        update_table(networks.schedule, StepPlan.trailing(1), recipe.prediction_type)
    except Exception as error:  # each library refuses sizes with errors of its own
        reason = str(error).strip().splitlines()[-1].strip()
        raise RecipeError(f"the recipe's network or schedule does not fit together: {reason}") from None
    return networks


class DenoisingLoss(nn.Module):
    """Mean squared error of the network's own prediction type (Ho et al. 2020 for eps; Salimans & Ho 2022 for v)."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.networks = networks.unet, networks.text_encoder, networks

    def forward(self, x0: torch.Tensor, ids: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0, eps (B, C, h, w); ids (B, L); t (B,) integer times."""
        alpha_t, sigma_t = self.networks.signal_and_noise(t)
        x_t = alpha_t * x0 + sigma_t * eps
        target = eps if self.networks.prediction_type == "epsilon" else alpha_t * eps - sigma_t * x0
        m = self.unet(x_t, t, encoder_hidden_states=self.text_encoder(ids)[0]).sample
        return nn.functional.mse_loss(m.float(), target)


class TeacherTask:
    """Fits the UNet and the text encoder together on a pool of encoded scenes, with captions of its own at every step."""

    name = "teacher"

    def __init__(
        self, recipe: TeacherRecipe, networks: Networks, latents: torch.Tensor, started_from: str = ""
    ) -> None:
        self.recipe, self.networks, self.latents = recipe, networks, latents
        self.identity = identify(recipe, started_from, networks.tokenizer.get_vocab())
        networks.unet.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
        if recipe.fit.mixed_precision == "bf16":
            plain_attention(networks)
        self.module: nn.Module = DenoisingLoss(networks)
        self.empty = networks.tokens([""])[0]

    def batch(self, step: int, rank: int) -> dict[str, Any]:
        size, draw = self.recipe.fit.batch, seeded(self.recipe.seed, 2, step, rank)
        rows = torch.randint(len(self.latents), (size,), generator=draw)
        words = np.random.default_rng([self.recipe.seed, 5, step, rank])
        captions = [describe(scene_at(self.recipe.seed, int(row)), words).text for row in rows]  # new ones every time
        x0, ids = self.latents[rows].float(), self.networks.tokens(captions)
        ids[torch.rand(size, generator=draw) < self.recipe.caption_dropout] = self.empty
        spread = (torch.rand(1, generator=draw) + torch.arange(size) / size) % 1  # evenly over all times
        t = (spread * self.networks.schedule.num_train_timesteps).long()
        return {"x0": x0, "ids": ids, "eps": torch.randn(x0.shape, generator=draw), "t": t}

    def preview(self) -> Image.Image:
        prompts = list(PREVIEW_PROMPTS)
        return grid(draw(self.networks, prompts * 2, list(range(16)), steps=25, guidance=2.0), columns=8)


@torch.no_grad()
def draw(networks: Networks, prompts: Sequence[str], seeds: list[int], *, steps: int, guidance: float) -> np.ndarray:
    """Guided deterministic sampling, as a teacher is used: (B, H, W, 3) uint8."""
    table = update_table(
        networks.schedule,
        StepPlan.trailing(steps, networks.schedule.num_train_timesteps),
        networks.prediction_type,
        noise_correction=False,
    )
    device = networks.unet.device
    noise = noise_of(seeds, networks.latent_shape).to(device)
    uncond = networks.embed([""]) if guidance != 1 else None
    return to_pixels(
        networks.decode(networks.sample(noise, networks.embed(prompts), table, uncond=uncond, guidance=guidance))
    )


def train_teacher(
    recipe: TeacherRecipe,
    out: Path,
    *,
    start: Path | None = None,
    font: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train everything and write the pipeline folder `out`; the run's state is kept beside it in `{out}.run`.

    start: another teacher's folder; its autoencoder is kept, and the other networks begin with its weights where the shapes allow.
    Returns the figures of each stage. Called again after a kill, it goes on where the last checkpoint was.
    """
    console = console or Console()
    out = out.resolve()
    refuse_foreign(out, ())
    run = out.with_name(out.name + ".run")
    scenes = EmojiScenes(seed=recipe.seed, size=recipe.image_size, font=font)
    figures: dict[str, Any] = {}
    if start is None:
        first = AutoencoderTask(recipe, scenes)
        networks = build_networks(recipe, first.autoencoder)  # before the hours of training: it may not fit together
        run.mkdir(parents=True, exist_ok=True)
        figures["autoencoder"] = fit(first, recipe.autoencoder.fit, run)
        console.print(f"autoencoder: {figures['autoencoder']}")
    else:
        earlier = load_networks(start)
        networks = build_networks(recipe, earlier.vae)
        figures["start"] = begin_with(networks, earlier)
        console.print(f"weights from {start}: {figures['start']}")
        run.mkdir(parents=True, exist_ok=True)
    networks.vae.requires_grad_(False)
    with PartialState().main_process_first():
        latents = encoded_scenes(
            networks,
            run / "latents.safetensors",
            seed=recipe.seed,
            size=recipe.image_size,
            count=recipe.scenes,
            font=font,
        )
    task = TeacherTask(recipe, networks, latents, hash_folder(start) if start else "")
    figures["teacher"] = fit(task, recipe.fit, run)
    console.print(f"teacher: {figures['teacher']}")
    save_pipeline(networks, out)
    return figures


@torch.no_grad()
def begin_with(networks: Networks, earlier: Networks) -> dict[str, int]:
    """Copy the weights of `earlier` that fit: by name and shape, token embeddings by token, positions as far as both go.

    Returns how many tensors were copied and how many were left as they are.
    """
    found = {"copied": 0, "new": 0}
    for ours, theirs in ((networks.unet, earlier.unet), (networks.text_encoder, earlier.text_encoder)):
        old = theirs.state_dict()
        for name, value in ours.state_dict().items():
            if name.endswith("token_embedding.weight") and name in old and old[name].shape[1] == value.shape[1]:
                before = earlier.tokenizer.get_vocab()
                for token, row in networks.tokenizer.get_vocab().items():
                    if token in before:
                        value[row] = old[name][before[token]]
            elif name.endswith("position_embedding.weight") and name in old and old[name].shape[1] == value.shape[1]:
                both = min(len(value), len(old[name]))
                value[:both] = old[name][:both]
            elif name in old and old[name].shape == value.shape:
                value.copy_(old[name])
            else:
                found["new"] += 1
                continue
            found["copied"] += 1
    return found


def save_pipeline(
    networks: Networks,
    out: Path,
    *,
    extra: dict[str, str] | None = None,
    replaces: Sequence[str] = (),
    sampler: dict[str, Any] | None = None,
) -> None:
    """Write a diffusers StableDiffusionPipeline folder in half precision, in one atomic rename, from the first process.

    extra: further files by name. replaces: an old folder with one of these files gives way. sampler: keys of the scheduler's
    config that ImagineFlashScheduler reads; stock classes pass over them.
    """
    if not PartialState().is_main_process:
        return
    parts: dict[str, Any] = {
        name: copy.deepcopy(getattr(networks, name)).cpu().to(torch.float16) for name in ("vae", "text_encoder", "unet")
    }
    scheduler = DDIMScheduler.from_config(
        networks.scheduler_config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(**parts, **without, tokenizer=networks.tokenizer, requires_safety_checker=False)
    with atomic_folder(out, replaces=replaces) as temporary:
        pipeline.save_pretrained(str(temporary))
        config = temporary / "scheduler" / "scheduler_config.json"
        values = json.loads(config.read_text(encoding="utf-8")) | (sampler or {})
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
