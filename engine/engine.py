"""The engine: requests in, pictures with stage timings out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.artifact import STAGES, ArtifactManifest, Size, read_artifact_manifest, size_name
from ..core.errors import ArtifactError, RequestError, nearest
from ..core.noise import initial_noise
from ..core.plan import select
from ..core.update import UpdateTable, reference_update
from .backends import Backend, load_backend
from .prompt_cache import DEFAULT_BYTES, PromptCache
from .request import GenerateRequest
from .tokenizer import PromptTokenizer, Tokens

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
    the whole sampler as one graph. The same seed gives the same picture by both; an artifact that holds the graphs of one
    alone takes that one.
    """

    def __init__(
        self, backend: Backend, tokenizer: PromptTokenizer, manifest: ArtifactManifest, *, route: Route = "stages",
        prompt_cache: PromptCache | None = None, folder: Path | None = None,
    ) -> None:  # fmt: skip
        if route not in ROUTES:
            raise ArtifactError(f"no route {route!r}{nearest(route, ROUTES)}; known: {', '.join(ROUTES)}")
        if "denoiser" not in manifest.graphs:
            route = "sampler"
        elif f"sampler_{max(manifest.plans)}" not in manifest.graphs:
            route = "stages"
        self.backend, self.tokenizer, self.manifest, self.route = backend, tokenizer, manifest, route
        self.folder = Path() if folder is None else folder
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
        loaded, tokenizer = load_backend(backend, folder, manifest), PromptTokenizer.load(folder, manifest.tokenizers)
        engine = cls(
            loaded, tokenizer, manifest, route=route, prompt_cache=PromptCache(prompt_cache_bytes), folder=folder
        )
        loaded.prepare(STAGES if engine.route == "stages" else [f"sampler_{max(engine.steps)}"])
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
        size = self._size(request)
        tokens = clock("tokenize", lambda: self.tokenizer.encode(request.prompt))
        shape = self.manifest.latent_shape_of(size)
        noise = clock("noise", lambda: initial_noise(request.seed, request.count, shape))
        draw = self._by_stages(tokens, steps, clock) if self.route == "stages" else self._whole(tokens, steps, clock)
        chunks = [draw(noise[i : i + _CHUNK]) for i in range(0, request.count, _CHUNK)]
        return GenerateResult(
            images=np.concatenate(chunks), timings={**clock.seconds, "total": time.perf_counter() - started}, steps=steps,
            seed=request.seed, unknown_words=self.tokenizer.unknown_words(request.prompt),
        )  # fmt: skip

    def _size(self, request: GenerateRequest) -> Size:
        """The request's size, by default the artifact's first."""
        height, width = self.manifest.image_size
        size = (request.height or height, request.width or width)
        if size not in self.manifest.sizes:
            known = ", ".join(size_name(size) for size in self.manifest.sizes)
            raise RequestError(f"this artifact draws {known} (width x height), got {size_name(size)}")
        return size

    def _by_stages(self, tokens: Tokens, steps: int, clock: _Clock) -> Draw:
        """Text encoder once; then, per chunk of noise, denoiser and update for each step, and the decoder."""
        table: UpdateTable = self._tables[steps]
        text = clock("encode", lambda: self.prompt_cache.get(tokens, lambda: self.backend.encode(tokens)))  # (1, ...)

        def draw(x: NDArray[np.float32]) -> NDArray[np.uint8]:
            conditions = [np.repeat(condition, len(x), axis=0) for condition in text]
            for i, t in enumerate(self._times[steps]):
                m = clock(
                    "denoise", lambda x=x, t=t: self.backend.denoise(x, np.full(len(x), t, np.float32), conditions)
                )
                x = clock("update", lambda x=x, m=m, i=i: reference_update(x, m, table, i))
            return clock("decode", lambda: self.backend.decode(x))

        return draw

    def _whole(self, tokens: Tokens, steps: int, clock: _Clock) -> Draw:
        """One call per chunk of noise."""

        def draw(x: NDArray[np.float32]) -> NDArray[np.uint8]:
            repeated = {name: np.repeat(ids, len(x), axis=0) for name, ids in tokens.items()}
            return clock("sampler", lambda: self.backend.sample(steps, repeated, x))

        return draw


class _Clock:
    """Adds up the seconds of each stage of one request."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        value = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        return value
