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
    and most steps unless the request says so. The oracle of the engine; of models without stages by the whole sampler.
    """
    steps, count, size = request.steps or max(manifest.plans), request.count, manifest.image_size
    size = (request.height or size[0], request.width or size[1])
    tokens = {name: ids.repeat(count, 0) for name, ids in tokenizer.encode(tokenizer.read(request.prompt).text).items()}
    shape = manifest.latent_shape_of(size)
    noise = backend.upload(initial_noise(request.seed, count, shape))
    if "denoiser" not in manifest.graph_names:
        return backend.sample(f"sampler_{steps}", list(tokens.values()), noise)[0]
    table, conditions, schedule = manifest.update_tables()[steps], backend.encode(tokens), manifest.schedule
    fresh = [backend.upload(step_noise(request.seed, count, shape, i + 1)) for i in range(len(table))]

    def denoise(x: Array, t: float) -> Array:
        return backend.denoise(x, np.full(count, schedule.network_time(t), np.float32), conditions)

    return backend.decode(sample(denoise, noise, table, noises=fresh))[0]
