"""The definition of what an engine draws: one stage after another in the caller's thread, nothing shared and nothing cached."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.noise import initial_noise, step_noise
from ..core.update import sample
from ..folders.manifests import ModelDescription
from .backends.base import Array, Backend
from .request import GenerateRequest
from .tokenizer import PromptTokenizer


def reference_generate(
    backend: Backend, tokenizer: PromptTokenizer, manifest: ModelDescription, request: GenerateRequest
) -> NDArray[np.uint8]:
    """A request's pictures (count, H, W, 3), by `core.update.sample` around the backend's networks; the model's default size
    and steps unless the request says so. The oracle of the engine; of models without stages by the whole sampler.
    """
    steps, count, size = request.steps or manifest.default_plan, request.count, manifest.image_size
    size = (request.height or size[0], request.width or size[1])
    table, schedule, shape = manifest.update_tables()[steps], manifest.schedule, manifest.latent_shape_of(size)
    noise = backend.upload(initial_noise(request.seed, count, shape))
    fresh = [step_noise(request.seed, count, shape, i + 1) for i in range(len(table))]
    known = manifest.guidance
    scale = known.default if request.guidance is None else request.guidance
    told = [np.full(count, scale, np.float32)] if known.embedded else []

    def tokens_of(prompt: str) -> dict[str, NDArray[np.int64]]:
        return {name: ids.repeat(count, 0) for name, ids in tokenizer.encode(prompt).items()}

    reading = tokenizer.read(request.prompt, request.negative_prompt or "")
    tokens = tokens_of(reading.text)
    if "denoiser" not in manifest.graph_names:
        needed = [np.stack([fresh[i] for i in table.renoised], axis=1)] if table.renoised else []
        return backend.sample(f"sampler_{steps}", [*tokens.values(), *told], noise, *map(backend.upload, needed))[0]
    told = [backend.upload(values) for values in told]
    if manifest.control:
        condition = np.zeros((*size, 3), np.uint8) if request.condition is None else request.condition
        told += [1 * one for one in backend.encode_condition(np.stack([condition] * count))]
        told.append(backend.upload(np.full(count, request.held, np.float32)))
    conditions = tuple(
        1 * one for one in backend.encode(tokens)
    )  # a captured graph writes its next answer over the last
    if known.empty_is_zero and not request.negative_prompt:
        against = tuple(0 * one for one in conditions)
    else:
        against = tuple(1 * one for one in backend.encode(tokens_of(reading.negative)))

    def denoise(x: Array, t: float) -> Array:
        times = np.full(count, schedule.network_time(t), np.float32)
        m = 1 * backend.denoise(x, times, (*conditions, *told))
        if scale <= 1 or known.embedded:
            return m
        m_u = backend.denoise(x, times, (*against, *told))
        return m_u + scale * (m - m_u)

    return backend.decode(sample(denoise, noise, table, noises=[backend.upload(z) for z in fresh]))[0]
