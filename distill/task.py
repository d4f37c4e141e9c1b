"""A distillation as a task of `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..core.plan import StepPlan
from ..core.update import UpdateTable
from ..pipelines.networks import Conditions
from .backward import table_of
from .data.embeddings import Embeddings
from .grids import grid
from .lora import WithoutAdapters, add_adapters
from .methods import method_named
from .methods.contract import DistillationLoss, Draws
from .models import Denoiser, Model, noise_of, noises_of, plain_attention
from .processes import processes
from .recipe import DistillRecipe
from .reproducible import Part, fingerprint, part_of, rows_of, seeded
from .run import Task

_VALIDATED = 32  # prompts
_VALIDATION_SEED = 1 << 30  # far from what a training or a preview draws


class DistillTask(Task):
    """Fits the student's network by the recipe's method."""

    name = "student"

    def __init__(
        self,
        recipe: DistillRecipe,
        teacher: Model,
        prompts: list[str],
        teacher_sha256: str,
        *,
        pictures: Sequence[torch.Tensor] = (),
        pictures_sha256: str = "",
        start: tuple[nn.Module, str] | None = None,
        shown: Sequence[str] = (),
        text_file: Path | None = None,
        device: str | None = None,
    ) -> None:
        """pictures: latents of the pictures that `prompts` describe, in their order, for a method that asks for them: one tensor
        (N, C, h, w) per size, and all rows of an update are of one. pictures_sha256: their hash, where the recipe does not say
        what they are. start: the network to begin with instead of the teacher's, which it becomes, and the hash of its folder.
        shown: prompts of the preview, else the first ones. text_file: where the prompts' embeddings are kept, if they are.
        device: the kind that trains it, where that is not the teacher's."""
        self.recipe, self.teacher, self.pictures = recipe, teacher, pictures
        self.method = method_named(recipe.method)
        begin, begin_sha256 = start or (None, "")
        known = (recipe, teacher_sha256, prompts, begin_sha256)
        self.fingerprint = fingerprint(*known, *filter(None, [pictures_sha256]))
        torch.manual_seed(recipe.seed)  # the first weights of adapters
        denoiser = teacher.denoiser
        if begin is not None:
            self.student = teacher.with_network(begin.float().requires_grad_(True))
        elif recipe.lora is None:
            self.student = teacher.trainable_copy()
        else:
            self.student = add_adapters(teacher, recipe.lora)
            denoiser = teacher.denoiser.with_network(WithoutAdapters(teacher.denoiser.network, teacher.network))
        if recipe.fit.mixed_precision == "bf16" and (device or teacher.device.type) == "cpu":
            for each in (teacher, self.student):
                plain_attention(each)
        torch.manual_seed(recipe.seed)  # the first weights of a discriminator
        self.module = self.loss = DistillationLoss(self.method, self.student.denoiser, denoiser, recipe)
        if recipe.gradient_checkpointing:
            inside: list[Any] = [part for network in self.loss.networks for part in network.children()]
            for part in inside:
                if any(weight.requires_grad for weight in part.parameters()):
                    part.enable_gradient_checkpointing()
        if recipe.lora is None:  # what trains began with the teacher as it is stored
            for value in filter(torch.is_floating_point, teacher.network.state_dict(keep_vars=True).values()):
                value.data = value.detach().to(getattr(torch, recipe.teacher_dtype))
        self.reference = replace(teacher, denoiser=denoiser)
        self.shown, self._teacher_row = list(shown or prompts[:8]), None
        self._teacher_latents: torch.Tensor | None = None
        self.shown_text, self.uncond = teacher.embed(self.shown), teacher.embed_negative(recipe.negative_prompt)
        self.text = Embeddings(teacher, prompts, text_file, teacher_sha256)

    @property
    def averaged(self) -> nn.Module:
        return self.student.network

    @property
    def networks(self) -> list[nn.Module]:
        return self.loss.networks

    @property
    def resting(self) -> list[nn.Module]:
        """The teacher, where it is no part of the student."""
        return [self.teacher.denoiser.network] if self.recipe.lora is None else []

    @property
    def frozen(self) -> frozenset[str]:
        parameters = self.student.denoiser.network.named_parameters(prefix="student")
        return frozenset(name for name, p in parameters if not p.requires_grad)

    def batch(self, step: int, part: Part) -> dict[str, Any]:
        seed, size = self.recipe.seed, self.recipe.fit.batch
        generator = seeded(seed, 3, step, 0)
        rows, pictures = self._rows(step, size, generator)
        draws = Draws(
            step=step,
            size=size,
            latent_shape=self.teacher.latent_shape if pictures is None else pictures[0].shape,
            last_time=self.teacher.denoiser.last_time,
            generator=generator,
            shared=np.random.default_rng([seed, step]),
            pictures=pictures,
        )
        batch = part_of(self.method.draw(draws, self.recipe), size, part)
        own = rows[rows_of(size, part)]
        batch["text"] = self.text[own]
        batch["uncond"] = tuple(u.expand(len(own), *u.shape[1:]) for u in self.uncond)
        return batch

    def _rows(self, step: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which prompts an update takes, and their pictures; each picture as often, whatever its size."""
        if not self.pictures:
            return torch.randint(len(self.text), (size,), generator=generator), None
        counts = [len(group) for group in self.pictures]
        chosen = int(
            np.random.default_rng([self.recipe.seed, step, 1]).choice(len(counts), p=np.divide(counts, sum(counts)))
        )
        rows = torch.randint(counts[chosen], (size,), generator=generator)
        return rows + sum(counts[:chosen]), self.pictures[chosen][rows]

    def after_update(self, step: int) -> None:
        self.loss.after_update(step)

    def validate(self) -> dict[str, float]:
        """Mean squared distance of the student's latents to those of the guided teacher in 25 steps, from noises of its own:
        over all plans ("distance"), and for each ("distance_3" for 3 steps)."""
        rows = torch.arange(min(_VALIDATED, len(self.text)))
        seeds, text = [_VALIDATION_SEED + int(row) for row in rows], self.text[rows]
        if self._teacher_latents is None:
            self._teacher_latents = self._guided(seeds, text)
        distances = {}
        for steps, table in inference_tables(self.teacher.denoiser, self.recipe).items():
            drawn = self._sampled(self.student, seeds, text, table)
            distances[f"distance_{steps}"] = float((drawn - self._teacher_latents).square().mean())
        return {"distance": sum(distances.values()) / len(distances)} | distances

    def preview(self) -> Image.Image:
        """A row of the guided teacher in 25 steps, then one for each plan of the student, all from the same noises."""
        seeds, text = list(range(len(self.shown))), self.shown_text
        if self._teacher_row is None:
            self._teacher_row = self._decoded(self._guided(seeds, text))
        tables = inference_tables(self.teacher.denoiser, self.recipe).values()
        rows = [self._decoded(self._sampled(self.student, seeds, text, table)) for table in tables]
        return grid(np.concatenate([self._teacher_row, *rows]), columns=len(self.shown))

    @property
    def _at_once(self) -> int:
        """Rows of one pass through the networks: as many as an update has, whose memory there is."""
        return max(1, self.recipe.fit.batch // (self.recipe.fit.accumulate * processes().num_processes))

    def _guided(self, seeds: Sequence[int], text: Conditions) -> torch.Tensor:
        """Latents of the guided teacher in 25 steps."""
        table = table_of(self.teacher.denoiser, StepPlan.trailing(25, self.teacher.denoiser.last_time + 1).timesteps)
        guidance = sum(self.recipe.guidance) / 2
        return self._sampled(self.reference, seeds, text, table, uncond=self.uncond, guidance=guidance)

    def _sampled(
        self, model: Model, seeds: Sequence[int], text: Conditions, table: UpdateTable, **how: Any
    ) -> torch.Tensor:
        """Latents (B, C, h, w) from the noises of the seeds, on the networks' device, wherever the text is."""
        device, parts = model.device, []
        for first in range(0, len(seeds), self._at_once):
            rows = slice(first, first + self._at_once)
            fresh = [each.to(device) for each in noises_of(seeds[rows], model.latent_shape, table)]
            noise, told = noise_of(seeds[rows], model.latent_shape), tuple(each[rows].to(device) for each in text)
            parts.append(model.sample(noise.to(device), told, table, noises=fresh, **how))
        return torch.cat(parts)

    def _decoded(self, latents: torch.Tensor) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8."""
        return np.concatenate([self.student.decode(part) for part in latents.split(self._at_once)])


def inference_tables(denoiser: Denoiser, recipe: DistillRecipe) -> dict[int, UpdateTable]:
    """The update table of each plan, as inference uses it."""
    how: dict[str, Any] = {"noise_correction": recipe.noise_correction, "sampler": method_named(recipe.method).sampler}
    return {steps: table_of(denoiser, times, **how) for steps, times in recipe.plans.items()}
