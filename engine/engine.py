"""The engine: requests in, pictures with stage timings out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.artifact import STAGES, ArtifactManifest, read_artifact_manifest
from ..core.errors import ArtifactError, nearest
from ..core.noise import initial_noise
from ..core.plan import select
from ..core.update import UpdateTable, reference_update
from .backends import Backend, load_backend
from .prompt_cache import DEFAULT_BYTES, PromptCache
from .request import GenerateRequest
from .tokenizer import PromptTokenizer

Route = Literal["stages", "sampler"]
ROUTES = ("stages", "sampler")
EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "emoji" / "artifact"
_CHUNK = 8  # pictures of one network call: bounds the memory of a large request

Draw = Callable[[NDArray[np.float32]], NDArray[np.uint8]]  # x_T (B, C, h, w) -> images (B, H, W, 3)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """images: uint8 (N, H, W, 3). timings: seconds per stage and "total". seed: of the first picture, the others follow it."""

    images: NDArray[np.uint8]
    timings: dict[str, float]
    steps: int
    seed: int
    unknown_words: list[str]


class Engine:
    """Draws with one artifact. Thread-safe: the prompt cache is the only state that a request changes.

    route "stages" runs text encoder, denoiser and decoder one after another with core's update in between; "sampler" runs
    the whole sampler as one graph. The same seed gives the same picture by both.
    """

    def __init__(
        self, backend: Backend, tokenizer: PromptTokenizer, manifest: ArtifactManifest, *, route: Route = "stages",
        prompt_cache: PromptCache | None = None,
    ) -> None:  # fmt: skip
        if route not in ROUTES:
            raise ArtifactError(f"no route {route!r}{nearest(route, ROUTES)}; known: {', '.join(ROUTES)}")
        self.backend, self.tokenizer, self.manifest, self.route = backend, tokenizer, manifest, route
        self.prompt_cache = PromptCache() if prompt_cache is None else prompt_cache
        self._plans, self._tables = manifest.step_plans, manifest.update_tables()
        self._times = {
            steps: manifest.schedule.network_time(table.timesteps).astype(np.float32)
            for steps, table in self._tables.items()
        }

    @classmethod
    def load(
        cls, path: str | Path | None = None, *, backend: str = "auto", route: Route = "stages",
        prompt_cache_bytes: int = DEFAULT_BYTES,
    ) -> Engine:  # fmt: skip
        """Load an artifact folder, by default the embedded model. Every file's hash is checked.

        prompt_cache_bytes: room for embeddings of the prompts seen last; 0 encodes every time.
        Raises ArtifactError for a folder that is missing, damaged, newer or of another kind, MissingExtraError for a
        backend that is not installed.
        """
        folder = EMBEDDED if path is None else Path(path)
        if path is None and not folder.is_dir():
            raise ArtifactError("this installation has no embedded model; give --model PATH or install the wheel")
        manifest = read_artifact_manifest(folder)
        loaded, tokenizer = load_backend(backend, folder, manifest), PromptTokenizer.load(folder, manifest.tokenizer)
        engine = cls(loaded, tokenizer, manifest, route=route, prompt_cache=PromptCache(prompt_cache_bytes))
        loaded.prepare(STAGES if route == "stages" else [f"sampler_{max(engine.steps)}"])
        return engine

    @property
    def steps(self) -> list[int]:
        """The step counts that the model was distilled for."""
        return sorted(self._plans)

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """Draw a request. Raises PlanError for steps the model has no plan for, RequestError for too long a prompt."""
        started = time.perf_counter()
        steps = max(self._plans) if request.steps is None else request.steps
        select(self._plans, steps)
        clock = _Clock()
        ids = clock("tokenize", lambda: self.tokenizer.encode(request.prompt)[None])
        noise = clock("noise", lambda: self._noise(request))
        draw = self._by_stages(ids, steps, clock) if self.route == "stages" else self._whole(ids, steps, clock)
        chunks = [draw(noise[i : i + _CHUNK]) for i in range(0, request.count, _CHUNK)]
        return GenerateResult(
            images=np.concatenate(chunks), timings={**clock.seconds, "total": time.perf_counter() - started}, steps=steps,
            seed=request.seed, unknown_words=self.tokenizer.unknown_words(request.prompt),
        )  # fmt: skip

    def _noise(self, request: GenerateRequest) -> NDArray[np.float32]:
        channels, height, width = self.manifest.latent_shape
        return initial_noise(request.seed, request.count, (channels, height, width))

    def _by_stages(self, ids: NDArray[np.int64], steps: int, clock: _Clock) -> Draw:
        """Text encoder once; then, per chunk of noise, denoiser and update for each step, and the decoder."""
        table: UpdateTable = self._tables[steps]
        text = clock("encode", lambda: self.prompt_cache.get(ids, lambda: self.backend.encode(ids)))  # (1, L, D)

        def draw(x: NDArray[np.float32]) -> NDArray[np.uint8]:
            embeddings = np.repeat(text, len(x), axis=0)
            for i, t in enumerate(self._times[steps]):
                m = clock(
                    "denoise", lambda x=x, t=t: self.backend.denoise(x, np.full(len(x), t, np.float32), embeddings)
                )
                x = clock("update", lambda x=x, m=m, i=i: reference_update(x, m, table, i))
            return clock("decode", lambda: self.backend.decode(x))

        return draw

    def _whole(self, ids: NDArray[np.int64], steps: int, clock: _Clock) -> Draw:
        """One call per chunk of noise."""
        return lambda x: clock("sampler", lambda: self.backend.sample(steps, np.repeat(ids, len(x), axis=0), x))


class _Clock:
    """Adds up the seconds of each stage of one request."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        value = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        return value
