"""`train-teacher`: tokenizer, text encoder, autoencoder and UNet from nothing, as a diffusers pipeline folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from rich.console import Console
from torch import nn

from ..core.errors import RecipeError
from ..core.plan import StepPlan
from ..core.update import update_table
from ..folders.files import hash_folder, refuse_foreign
from .autoencoder import AutoencoderTask
from .data.captions import Scene, describe, describe_with_patterns
from .data.emoji import EmojiScenes, scene_at
from .data.latents import encoded_scenes
from .fit import fit
from .grids import grid
from .models import Model, load_model, noise_of, plain_attention
from .processes import check_split, on_cpu, processes
from .recipe import TeacherRecipe
from .report import check_trackers
from .reproducible import Part, fingerprint, part_of, seeded
from .run import Task
from .saving import save_pipeline
from .untrained import build_model

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

_VALIDATION_STEP = 1 << 30  # a batch that no training comes to


class DenoisingLoss(nn.Module):
    """Mean squared error of the network's own prediction type (Ho et al. 2020 for eps; Salimans & Ho 2022 for v)."""

    def __init__(self, model: Model, known: Model | None = None) -> None:
        """known: another teacher, whose estimates of x0 and eps at x_t take the place of the data's."""
        super().__init__()
        self.unet, self.text_encoder = model.network, model.pipeline.text_encoder
        self.model, self.known = model, known

    def forward(self, x0: torch.Tensor, ids: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0, eps (B, C, h, w); ids (B, L); t (B,) integer times."""
        denoiser = self.model.denoiser
        alpha_t, sigma_t = denoiser.scales(t, x0)
        x_t = alpha_t * x0 + sigma_t * eps
        if self.known is not None:
            with torch.no_grad():
                x0, eps = self.known.denoiser.x0_eps(x_t, t, self.known.embed_tokens({"input_ids": ids}))
        said = denoiser(x_t, t, self.model.stages.text_encoder(ids))
        return nn.functional.mse_loss(said, denoiser.target(x0, eps, t))


class TeacherTask(Task):
    """Fits the UNet and the text encoder together on a pool of encoded scenes, with captions of its own at every step."""

    name = "teacher"

    def __init__(
        self,
        recipe: TeacherRecipe,
        model: Model,
        latents: torch.Tensor,
        started_from: str = "",
        known: Model | None = None,
    ) -> None:
        """started_from: a hash of the teacher that it began with; known: that teacher, where it gives the targets."""
        self.recipe, self.model, self.latents = recipe, model, latents
        self.fingerprint = fingerprint(recipe, started_from, model.pipeline.tokenizer.get_vocab())
        model.network.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
        if recipe.fit.mixed_precision == "bf16" and on_cpu():
            for each in filter(None, (model, known)):
                plain_attention(each)
        self.module: nn.Module = DenoisingLoss(model, known).requires_grad_(True)
        self.empty = self._ids([""])[0]

    def _ids(self, captions: list[str]) -> torch.Tensor:
        (ids,) = self.model.tokens(captions).values()
        return ids

    def _caption(self, scene: Scene, words: np.random.Generator) -> str:
        share = self.recipe.stated_patterns
        return (describe_with_patterns(scene, words, share) if share else describe(scene, words)).text

    def batch(self, step: int, part: Part) -> dict[str, Any]:
        size, draw = self.recipe.fit.batch, seeded(self.recipe.seed, 2, step, 0)
        rows = torch.randint(len(self.latents), (size,), generator=draw)
        words = np.random.default_rng([self.recipe.seed, 5, step, 0])
        scenes = [scene_at(self.recipe.seed, int(row)) for row in rows]
        captions = [self._caption(scene, words) for scene in scenes]  # new ones every time
        x0, ids = self.latents[rows].float(), self._ids(captions)
        ids[torch.rand(size, generator=draw) < self.recipe.caption_dropout] = self.empty
        spread = (torch.rand(1, generator=draw) + torch.arange(size) / size) % 1  # evenly over all times
        t = (spread * (self.model.denoiser.last_time + 1)).long()
        batch = {"x0": x0, "ids": ids, "eps": torch.randn(x0.shape, generator=draw), "t": t}
        return part_of(batch, size, part)

    def validate(self) -> dict[str, float]:
        """The loss at times, noises and captions of its own, which no update has."""
        batch = send_to_device(self.batch(_VALIDATION_STEP, Part()), self.model.device)
        return {"loss": float(self.module(**batch))}

    def preview(self) -> Image.Image:
        prompts = list(PREVIEW_PROMPTS)
        return grid(draw(self.model, prompts * 2, list(range(16)), steps=25, guidance=2.0), columns=8)


def draw(model: Model, prompts: Sequence[str], seeds: list[int], *, steps: int, guidance: float) -> np.ndarray:
    """Guided deterministic sampling, as a teacher is used: (B, H, W, 3) uint8."""
    denoiser = model.denoiser
    plan = StepPlan.trailing(steps, denoiser.schedule.num_train_timesteps)
    table = update_table(denoiser.schedule, plan, denoiser.prediction_type, noise_correction=False)
    noise = noise_of(seeds, model.latent_shape).to(next(model.network.parameters()).device)
    uncond = model.embed_negative() if guidance != 1 else None
    return model.decode(model.sample(noise, model.embed(prompts), table, uncond=uncond, guidance=guidance))


def train_teacher(
    recipe: TeacherRecipe,
    out: Path,
    *,
    start: Path | None = None,
    font: Path | None = None,
    console: Console | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train everything and write the pipeline folder `out`; the run's state is kept beside it in `{out}.run`.

    track: trackers by accelerate's names, tensorboard for one.
    start: another teacher's folder; its autoencoder is kept, and the other networks begin with its weights where the shapes allow.
    Returns the figures of each stage. Called again after a kill, it goes on where the last checkpoint was.
    """
    check_trackers(track)
    if recipe.targets == "start" and start is None:
        raise RecipeError("targets: start are what another teacher predicts; give its folder by --start")
    for each in (recipe.fit, *([] if start else [recipe.autoencoder.fit])):
        check_split(each)
    console = console or Console(stderr=True)
    out = out.resolve()
    refuse_foreign(out, ())
    run = out.with_name(out.name + ".run")
    scenes = EmojiScenes(seed=recipe.seed, size=recipe.image_size, font=font)
    figures: dict[str, Any] = {}
    known: Model | None = None
    if start is None:
        first = AutoencoderTask(recipe, scenes)
        model = build_model(recipe, first.autoencoder)  # before the hours of training: it may not fit together
        first.autoencoder.decoder.requires_grad_(True)  # a model's stages are frozen
        figures["autoencoder"] = fit(first, recipe.autoencoder.fit, run, console, track=track)
        console.print(f"autoencoder: {figures['autoencoder']}")
    else:
        model, earlier, figures["start"] = _begun(recipe, start)
        known = earlier if recipe.targets == "start" else None
        console.print(f"weights from {start}: {figures['start']}")
    run.mkdir(parents=True, exist_ok=True)
    model.pipeline.vae.requires_grad_(False)
    with processes().main_process_first():
        what: Any = {"seed": recipe.seed, "size": recipe.image_size, "count": recipe.scenes}
        latents = encoded_scenes(model, run / "latents.safetensors", **what, font=font, console=console)
    task = TeacherTask(recipe, model, latents, hash_folder(start) if start else "", known)
    figures["teacher"] = fit(task, recipe.fit, run, console, track=track)
    console.print(f"teacher: {figures['teacher']}")
    save_pipeline(model, out)
    return figures


def _begun(recipe: TeacherRecipe, start: Path) -> tuple[Model, Model, dict[str, int]]:
    """A model with the autoencoder and, where they fit, the weights of the teacher in `start`; that teacher; and how many were
    copied. RecipeError where it cannot give the targets that the recipe asks for."""
    earlier = load_model(start).to(processes().device)
    model = build_model(recipe, earlier.pipeline.vae)
    if recipe.targets == "start":
        words = [
            (each.pipeline.tokenizer.get_vocab(), each.pipeline.tokenizer.model_max_length) for each in (model, earlier)
        ]
        noise = [each.denoiser.schedule.alpha for each in (model, earlier)]
        if words[0] != words[1] or not np.array_equal(noise[0], noise[1]):
            raise RecipeError(f"targets: start needs the seed, context and betas of the recipe that made {start}")
    return model, earlier, copy_weights(earlier, model)


@torch.no_grad()
def copy_weights(earlier: Model, model: Model) -> dict[str, int]:
    """Copy the weights of `earlier` that fit: by name and shape, token embeddings by token, positions as far as both go.

    Returns how many tensors were copied and how many were left as they are.
    """
    found = {"copied": 0, "new": 0}
    pairs = ((model.network, earlier.network), (model.pipeline.text_encoder, earlier.pipeline.text_encoder))
    for ours, theirs in pairs:
        old = theirs.state_dict()
        for name, value in ours.state_dict().items():
            if name.endswith("token_embedding.weight") and name in old and old[name].shape[1] == value.shape[1]:
                before = earlier.pipeline.tokenizer.get_vocab()
                for token, row in model.pipeline.tokenizer.get_vocab().items():
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
