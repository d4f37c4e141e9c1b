"""`distill`: a student of 1, 2 and 3 steps from a teacher folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from rich.console import Console
from torch import nn

from ..core.errors import ArtifactError, RecipeError
from ..core.plan import StepPlan
from ..core.update import UpdateTable, update_table
from ..folders.files import STUDENT_FILE, hash_folder, refuse_foreign
from ..folders.manifests import StudentManifest
from .data.latents import encoded_scenes
from .data.prompts import emoji_prompts
from .data.vocabulary import all_words, vocabulary
from .fit import fit, identify, seeded
from .grids import grid, to_pixels
from .losses import ImagineFlashLoss
from .networks import Networks, load_networks, noise_of, plain_attention
from .recipe import Adversarial, DistillRecipe
from .teacher import PREVIEW_PROMPTS, save_pipeline


class DistillTask:
    """Fits the student's UNet; prompts are all the data there is."""

    name = "student"

    def __init__(
        self,
        recipe: DistillRecipe,
        teacher: Networks,
        prompts: list[str],
        teacher_sha256: str,
        *,
        real: torch.Tensor | None = None,
        start: tuple[Any, str] | None = None,
    ) -> None:
        """real: latents of the pictures that `prompts` describe, for the discriminator. start: a UNet to begin with instead of
        the teacher's, and the hash of its folder."""
        self.recipe, self.teacher, self.real = recipe, teacher, real
        if recipe.fit.mixed_precision == "bf16":
            plain_attention(teacher)
        unet, started_from = start or (teacher.unet, "")
        self.identity = identify(recipe, teacher_sha256, prompts, started_from)
        self.student = copy.deepcopy(unet).requires_grad_(True)
        if recipe.fit.mixed_precision == "bf16":
            self.student.set_attn_processor(AttnProcessor())
        torch.manual_seed(recipe.seed)  # the discriminator's first weights
        self.module: nn.Module = ImagineFlashLoss(self.student, teacher, recipe)
        self.ids = torch.cat([teacher.tokens(prompts[i : i + 1000]) for i in range(0, len(prompts), 1000)])
        self.uncond = teacher.embed([""]).detach()

    def batch(self, step: int, rank: int) -> dict[str, Any]:
        size, draw = self.recipe.fit.batch, seeded(self.recipe.seed, 3, step, rank)
        shared = np.random.default_rng([self.recipe.seed, step])  # the same on every rank, or collectives would wait
        weights = self.recipe.plan_weights
        plan = int(shared.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
        index, shifted = int(shared.integers(plan)), bool(shared.random() >= self.recipe.plain_share)
        low, high = self.recipe.guidance
        shape = (size, *self.teacher.latent_shape)
        rows = torch.randint(len(self.ids), (size,), generator=draw)
        with torch.no_grad():
            text = self.teacher.text_encoder(self.ids[rows].to(self.uncond.device))[0]
        found = {
            "x_T": torch.randn(shape, generator=draw),
            "fresh": torch.randn(shape, generator=draw),
            "text": text,
            "uncond": self.uncond.expand(size, -1, -1),
            "plan": plan,
            "index": index,
            "guidance": low + (high - low) * torch.rand(size, generator=draw),
            "shifted": shifted and self.recipe.shifted,
        }
        if self.recipe.adversarial is not None:
            found["judged"] = self._judged(self.recipe.adversarial, rows, step, draw)
        return found

    def _judged(self, settings: Adversarial, rows: torch.Tensor, step: int, draw: torch.Generator) -> dict[str, Any]:
        """What the discriminator sees beside the student's pictures."""
        assert self.real is not None
        real = self.real[rows].float()
        low, high = (share * (self.teacher.schedule.num_train_timesteps - 1) for share in settings.noise)
        t = (low + (high - low) * torch.rand(len(rows), generator=draw)).long()
        share = settings.share * min(1.0, step / max(1, settings.ramp))
        noise, noise_real = (torch.randn(real.shape, generator=draw) for _ in range(2))
        return {"real": real, "noise": noise, "noise_real": noise_real, "t": t, "share": share}

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Rows of 1, 2 and 3 steps from the same noise."""
        prompts, rows = list(PREVIEW_PROMPTS), []
        noise = noise_of(list(range(len(prompts))), self.teacher.latent_shape).to(self.student.device)
        student = with_unet(self.teacher, self.student)
        for table in inference_tables(self.teacher, self.recipe).values():
            rows.append(to_pixels(student.decode(student.sample(noise, student.embed(prompts), table))))
        return grid(np.concatenate(rows), columns=len(prompts))


def with_unet(networks: Networks, unet: Any) -> Networks:
    """The same networks with another UNet."""
    return Networks(**{**networks.__dict__, "unet": unet})


def inference_tables(networks: Networks, recipe: DistillRecipe) -> dict[int, UpdateTable]:
    """The update table of each plan, as inference uses it."""
    return {
        steps: update_table(
            networks.schedule, StepPlan(times), networks.prediction_type, noise_correction=recipe.noise_correction
        )
        for steps, times in recipe.plans.items()
    }


def distill(
    teacher_folder: Path,
    out: Path,
    recipe: DistillRecipe,
    *,
    prompts: list[str] | None = None,
    start: Path | None = None,
    font: Path | None = None,
    console: Console | None = None,
) -> StudentManifest:
    """Distil `teacher_folder` into the student folder `out`; the run's state is kept beside it in `{out}.run`.

    prompts: instead of captions of emoji scenes. start: a student folder whose weights it begins with, instead of the
    teacher's. Called again after a kill, it goes on where the last checkpoint was. Errors: ArtifactError for a folder that is not a
    pipeline, RecipeError for a plan outside the teacher's schedule.
    """
    console = console or Console()
    out = out.resolve()
    if out == teacher_folder.resolve():
        raise ArtifactError(f"{out} is the teacher itself; write the student elsewhere")
    refuse_foreign(out, (STUDENT_FILE,))
    teacher, teacher_sha256 = load_networks(teacher_folder), hash_folder(teacher_folder)
    times = teacher.schedule.num_train_timesteps
    for timesteps in recipe.plans.values():
        if timesteps[0] != times - 1:
            raise RecipeError(f"plans must start at the teacher's last time {times - 1}, got {list(timesteps)}")
    run, real = out.with_name(out.name + ".run"), None
    if recipe.adversarial is not None:
        if prompts:
            raise RecipeError(
                "the discriminator needs real pictures, which prompts alone have not; leave out 'adversarial'"
            )
        side = teacher.latent_shape[-1] * 8
        real = encoded_scenes(
            teacher, run / "latents.safetensors", seed=recipe.seed, size=side, count=recipe.prompts, font=font
        )
    begun = (load_networks(start).unet, hash_folder(start)) if start else None
    captions = prompts or emoji_prompts(recipe.prompts, recipe.seed)
    task = DistillTask(recipe, teacher, captions, teacher_sha256, real=real, start=begun)
    device: Any = PartialState().device  # where accelerate puts the student
    teacher.to(device)
    task.uncond = task.uncond.to(device)
    figures = fit(task, recipe.fit, run)
    console.print(f"student: {figures}")
    manifest = StudentManifest(
        plans={steps: list(timesteps) for steps, timesteps in recipe.plans.items()},
        noise_correction=recipe.noise_correction,
        recipe=recipe.model_dump(mode="json"),
        teacher_sha256=teacher_sha256,
        training=figures,
        known_words=[] if prompts else all_words(),
        vocabulary={} if prompts else vocabulary(),
    )
    save_pipeline(
        with_unet(teacher, task.student),
        out,
        extra={STUDENT_FILE: manifest.model_dump_json(indent=2)},
        replaces=(STUDENT_FILE,),
        sampler={
            "plans": {str(n): list(times) for n, times in recipe.plans.items()},
            "noise_correction": recipe.noise_correction,
        },
    )
    return manifest
