"""The calls of a turn: what chunks that go together ask of the backend.

Nothing is committed before all of a call is computed, since one that fails is tried again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable
from ..folders.manifests import ModelDescription
from .backends.base import Array, Backend, LoraSet
from .editing import Start, first_step, latent_mask
from .work import Chunk, Job, by_job, rows_of, timed

# images (B, H, W, 3), whether each is finite (B,), and the stage that lost the others
Drawn = tuple[NDArray[np.uint8], NDArray[np.bool_], str]


@dataclass(frozen=True)
class PlanTables:
    """What a plan's steps need, float32 (n,): the network's times and the update's coefficients; and the noise levels.

    start: of x_T, by unit noise. renoised: the steps that take fresh noise, in the order of a request's noises.
    """

    times: NDArray[np.float32]
    a: NDArray[np.float32]
    b: NDArray[np.float32]
    c: NDArray[np.float32]
    start: float
    renoised: tuple[int, ...]
    timesteps: tuple[float, ...]
    levels: tuple[tuple[float, float], ...]  # alpha, sigma before each step, and after the last

    @classmethod
    def of(cls, schedule: NoiseSchedule, table: UpdateTable) -> PlanTables:
        times = schedule.network_time(table.timesteps).astype(np.float32)
        levels = [(float(alpha), float(sigma)) for alpha, sigma in zip(*schedule.at(table.timesteps), strict=True)]
        timesteps = tuple(table.timesteps.tolist())
        a, b, c = (column.astype(np.float32) for column in (table.a, table.b, table.c))
        return cls(times, a, b, c, table.start, table.renoised, timesteps, (*levels, (1.0, 0.0)))


class Calls:
    """Network calls of at most max_batch rows. counts: "batch N" are calls of the denoiser or sampler with N pictures."""

    def __init__(self, backend: Backend, manifest: ModelDescription, max_batch: int, counts: Counter[str]) -> None:
        self.backend, self.max_batch, self.counts = backend, max_batch, counts
        self._plans = {n: PlanTables.of(manifest.schedule, table) for n, table in manifest.update_tables().items()}
        self._downscale, self._last = manifest.downscale, manifest.schedule.num_train_timesteps - 1
        self._graphs, self._is_told = manifest.graph_names, manifest.guidance.embedded
        self._loras: LoraSet | None = ()  # that the networks draw with; None after a failure

    def start_from_image(self, chunks: Sequence[Chunk]) -> None:
        """The picture as latents, noised to the level of the step where drawing begins."""
        job = chunks[0].job
        request, plan = job.request, self._plans[job.steps]
        if job.start is None:
            assert request.image is not None
            image = request.image[None]
            latents = timed([job], "encode", lambda: self.backend.encode_image(image))
            mask = None if request.mask is None else self.backend.upload(latent_mask(request.mask, self._downscale))
            job.start = Start(latents, mask)
        for chunk in chunks:
            chunk.start, chunk.step = job.start, first_step(plan.timesteps, self._last, request.noised)
            if request.noised < 1:
                chunk.x = chunk.start.at(self.backend.upload(chunk.noise), *plan.levels[chunk.step])

    def adapt(self, group: Sequence[Chunk]) -> None:
        """The networks draw with the LoRAs that these chunks share."""
        loras = group[0].job.loras
        if loras != self._loras:
            self._loras = None
            timed(list(by_job(group)), "adapt", lambda: self.backend.adapt(loras))
            self._loras = loras
            self.counts["LoRA sets"] += 1

    def denoise(self, group: Sequence[Chunk]) -> None:
        """One network call and update; every chunk is a step further."""
        jobs = list(by_job(group))
        x = timed(jobs, "copy", lambda: self.backend.join([self._latents(chunk) for chunk in group]))
        m = self._predicted(jobs, group, x)
        a, b, c = (self._column(group, name) for name in ("a", "b", "c"))
        fresh = (c, self.backend.join([self._fresh(chunk) for chunk in group])) if c.any() else None
        x = timed(jobs, "update", lambda: self.backend.update(x, m, a, b, fresh))
        parts = []
        for chunk, own in zip(group, rows_of(group), strict=True):
            part = x if len(group) == 1 else x[own]
            if chunk.start is not None:
                plan, noise = self._plans[chunk.job.steps], self.backend.upload(chunk.noise)
                part = chunk.start.kept(part, noise, *plan.levels[chunk.step + 1])
            parts.append(part)
        for chunk, part in zip(group, parts, strict=True):
            chunk.x, chunk.step = part, chunk.step + 1

    def decode(self, group: Sequence[Chunk]) -> Drawn:
        """Pictures of all chunks in one call."""
        jobs = list(by_job(group))
        x = timed(jobs, "copy", lambda: self.backend.join([chunk.x for chunk in group]))
        images, finite = timed(jobs, "decode", lambda: self.backend.decode(x))
        stage = "decode" if finite.all() or self.backend.finite(x)[~finite].any() else "denoise"
        return images, finite, stage

    def has_embedding_samplers(self, new: Sequence[Chunk]) -> bool:
        """Whether whole samplers of these may be given conditions, which then come from the cache."""
        names = {f"sampler_{chunk.job.steps}_from_embeddings" for chunk in new}
        return "text_encoder" in self._graphs and names <= set(self._graphs)

    def sample(self, group: Sequence[Chunk]) -> Drawn:
        """Whole-sampler graphs: everything in one call."""
        jobs = list(by_job(group))
        name, join = f"sampler_{jobs[0].steps}", self.backend.join
        if group[0].conditions:
            name += "_from_embeddings"
            inputs: list[Any] = [join(parts) for parts in zip(*(chunk.conditions for chunk in group), strict=True)]
        else:
            keys = jobs[0].tokens
            inputs = [np.concatenate([chunk.job.tokens[key].repeat(chunk.rows, 0) for chunk in group]) for key in keys]
            if self._is_told:
                inputs.append(np.concatenate([np.full(c.rows, c.job.guidance, np.float32) for c in group]))
        noises = [join([self.backend.upload(chunk.noise) for chunk in group])]
        if self._plans[jobs[0].steps].renoised:
            noises.append(join([self.backend.upload(np.ascontiguousarray(chunk.noises[:, 1:])) for chunk in group]))
        images, finite = timed(jobs, "sampler", lambda: self.backend.sample(name, inputs, *noises))
        self.counts[f"batch {len(images)}"] += 1
        return images, finite, "sampler"

    def _predicted(self, jobs: Sequence[Job], group: Sequence[Chunk], x: Array) -> Array:
        """The network's answer for each picture; that for the prompt is weighed against that for the negative prompt where
        there is one: m = m_u + w (m_c - m_u). One call, unless that makes more rows than a call may have."""
        join, times, places = self.backend.join, self._column(group, "times"), rows_of(group)
        guided = [(chunk, own) for chunk, own in zip(group, places, strict=True) if chunk.against]
        rows = [x, *(x[own] for _, own in guided)]
        times = np.concatenate([times, *(times[own] for _, own in guided)])
        conditions = [*(chunk.conditions for chunk in group), *(chunk.against for chunk, _ in guided)]
        x, joined = timed(jobs, "copy", lambda: (join(rows), tuple(map(join, zip(*conditions, strict=True)))))
        m = timed(jobs, "denoise", lambda: self._ask(x, times, joined))
        if not guided:
            return m
        parts, after = [], sum(chunk.rows for chunk in group)
        for chunk, own in zip(group, places, strict=True):
            part = m[own]
            if chunk.against:
                other = m[after : after + chunk.rows]
                part, after = other + chunk.job.guidance * (part - other), after + chunk.rows
            parts.append(part)
        return join(parts)

    def _ask(self, x: Array, times: NDArray[np.float32], conditions: Sequence[Array]) -> Array:
        """The denoiser's answer, in as few calls as may be."""
        answers = []
        for start in range(0, len(times), self.max_batch):
            rows = slice(start, min(len(times), start + self.max_batch))
            whole = rows.stop - start == len(times)
            given = conditions if whole else tuple(one[rows] for one in conditions)
            answer = self.backend.denoise(x if whole else x[rows], times[rows], tuple(given))
            answers.append(answer if whole else 1 * answer)  # a captured graph writes its next answer over the last
            self.counts[f"batch {rows.stop - start}"] += 1
        return self.backend.join(answers)

    def _fresh(self, chunk: Chunk) -> Array:
        """The noise z of the chunk's next step, nought where it takes none."""
        renoised = self._plans[chunk.job.steps].renoised
        if chunk.step not in renoised:
            return self.backend.upload(np.zeros_like(chunk.noise))
        return self.backend.upload(np.ascontiguousarray(chunk.noises[:, 1 + renoised.index(chunk.step)]))

    def _column(self, group: Sequence[Chunk], name: str) -> NDArray[np.float32]:
        """One value per image: that of its plan at its step."""
        values = [getattr(self._plans[chunk.job.steps], name)[chunk.step] for chunk in group]
        return np.concatenate([np.full(c.rows, value, np.float32) for c, value in zip(group, values, strict=True)])

    def _latents(self, chunk: Chunk) -> Array:
        start = self._plans[chunk.job.steps].start
        return self.backend.upload(chunk.noise * np.float32(start)) if chunk.x is None else chunk.x
