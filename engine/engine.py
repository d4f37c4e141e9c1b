"""The engine: requests in, pictures with stage timings out."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..core.errors import ArtifactError, EngineError, RequestError
from ..core.noise import step_noise
from ..core.plan import select
from ..folders.manifests import IMAGE_ENCODER, ArtifactManifest, ModelDescription
from ..folders.publish import push_to_hub
from ..folders.sizes import AnySize, Size, size_name, sizes_text
from .backends.base import Backend
from .batching import Batcher
from .checks import check_condition, check_guidance, check_image, check_loras, check_size, is_drawn
from .editing import check_picture, check_size_of
from .loading import (
    MAX_WAITING,
    LoadOptions,
    Route,
    batch_buckets,
    check_max_batch,
    check_route,
    check_sizes,
    kinds_drawn_with,
    load_model,
)
from .prompt_cache import PromptCache
from .request import GenerateRequest
from .stats import EngineStats
from .tokenizer import PromptTokenizer, rows_of_prompt
from .verify import Verified, verify
from .work import Chunk, Client, Drawing, GenerateResult, Job, Prepared

DEFAULT_DEADLINE = 60.0  # seconds: how a request without a timeout ranks among those that have one


class Engine:
    """Draws with one artifact. Thread-safe; its own thread makes every call of the backend, so concurrent requests share
    them, and the thread that asks only waits.

    route "stages" runs text encoder, denoiser and decoder one after another with core's update in between; "sampler" runs
    the whole sampler as one graph. The same seed gives the same picture by both, whatever shares its calls, up to the last bits
    of float arithmetic (one of 255 levels). An artifact that holds the graphs of one route alone takes that one.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: PromptTokenizer,
        manifest: ModelDescription,
        *,
        route: Route = "stages",
        max_batch: int | None = None,
        max_waiting: int = MAX_WAITING,
        sizes: Sequence[Size] | None = None,
        prompt_cache: PromptCache | None = None,
        folder: Path | None = None,
    ) -> None:
        self.backend, self.tokenizer, self.manifest = backend, tokenizer, manifest
        self.route = check_route(route, manifest)
        self.max_batch = check_max_batch(max_batch, manifest.batch)
        self.sizes, self._bound = check_sizes(sizes, manifest), sizes is not None
        self.folder = Path() if folder is None else folder
        self.prompt_cache = PromptCache() if prompt_cache is None else prompt_cache
        self._plans = manifest.step_plans
        self._renoised = {steps: table.renoised for steps, table in manifest.update_tables().items()}
        self.batcher = Batcher(
            backend,
            manifest,
            self.prompt_cache,
            max_batch=self.max_batch,
            max_waiting=max_waiting,
            whole=self.route == "sampler",
        )
        weakref.finalize(self, self.batcher.close)

    @classmethod
    def load(cls, path: str | Path | None = None, options: LoadOptions | None = None, **changes: Any) -> Engine:
        """Load an artifact, by default the embedded model, after checking every file's hash; or a student, which runs in
        torch. path: a folder, or a hub id ("owner/name") that is downloaded. options: how; or its fields as arguments, such
        as Engine.load("folder", backend="openvino", max_batch=4): see LoadOptions.

        Raises ArtifactError for a folder that is missing, damaged, newer or of another kind, MissingExtraError for a
        backend that is not installed, RequestError for options that the model does not have.
        """
        if options is not None and changes:
            raise RequestError(
                f"LoadOptions have their own {', '.join(changes)}: give them to these, or all as arguments"
            )
        options = options or LoadOptions(**changes)
        loaded = load_model(path, options)
        return cls(
            loaded.backend,
            loaded.tokenizer,
            loaded.manifest,
            route=loaded.route,
            max_batch=loaded.max_batch,
            max_waiting=options.max_waiting,
            sizes=options.sizes,
            prompt_cache=PromptCache(options.prompt_cache_bytes),
            folder=loaded.folder,
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Engine:
        """`Engine.load`, by the name that the hub's libraries have for it: a hub id with its revision, or a folder."""
        return cls.load(path, **options)

    def push_to_hub(self, name: str, *, private: bool = False, revision: str | None = None) -> str:
        """Uploads the artifact that it draws with as the hub's model `name`, with a model card; returns its address.

        Raises ArtifactError for an engine of a student, and for what the hub refuses.
        """
        return push_to_hub(self.folder, name, private=private, revision=revision)

    @property
    def artifact(self) -> ArtifactManifest:
        """The manifest of the artifact that it draws with. Raises ArtifactError for an engine of a student."""
        if not isinstance(self.manifest, ArtifactManifest):
            raise ArtifactError(
                f"{self.folder} is a student, not an artifact; run: imagine-flash export {self.folder} OUT"
            )
        return self.manifest

    @property
    def steps(self) -> list[int]:
        """The step counts that the model was distilled for."""
        return sorted(self._plans)

    @property
    def loras(self) -> list[str]:
        """The names that a request's `lora` may give a weight."""
        return sorted(self.backend.loras)

    @property
    def draws_from_pictures(self) -> bool:
        """Whether a request may have an image: the model has an encoder of pictures for every size, and runs in stages."""
        encoders = (self.manifest.graph_name(IMAGE_ENCODER, size) for size in self.sizes)
        return self.route == "stages" and set(encoders) <= set(self.manifest.graph_names)

    def __repr__(self) -> str:
        return f"<Engine {self.describe()}>"

    @property
    def any_size(self) -> AnySize | None:
        """What it draws beside `sizes`, which are then only those to choose from by name; None where they are all."""
        return None if self._bound else self.manifest.any_size

    def draws(self, size: Size) -> bool:
        """Whether a request may have this size, (height, width)."""
        return is_drawn(size, self.sizes, self.any_size)

    @property
    def drawn_sizes(self) -> str:
        """The sizes that a request may have, for people."""
        return sizes_text(self.sizes, self.any_size)

    def describe(self) -> str:
        """One line: what draws, on what, how."""
        return f"{self.manifest.name}: {self.backend.describe()}, batches of up to {self.max_batch}"

    def stats(self) -> EngineStats:
        """What has happened so far, and what waits."""
        return EngineStats.of(self.batcher, self.prompt_cache)

    def verify(self) -> Iterator[Verified]:
        """Draws every reference picture of the artifact whose size the engine was loaded for, and compares it with what torch drew
        at the export.

        Raises ArtifactError for a student, an artifact without pictures or one that cannot be read.
        """
        return verify(self.folder, self.artifact, lambda request: self.generate(request).images[0], self.draws)

    def warm_up(self) -> None:
        """Load every graph of every size and batch, so that no request waits for one."""
        kinds = kinds_drawn_with(self.manifest, self.route, self.steps)
        self.backend.prepare(self._graphs_of(*kinds), batch_buckets(self.max_batch))
        if self.draws_from_pictures:
            self.backend.prepare(self._graphs_of(IMAGE_ENCODER))

    def _graphs_of(self, *kinds: str) -> list[str]:
        """Of every size."""
        return [*dict.fromkeys(self.manifest.graph_name(kind, size) for kind in kinds for size in self.sizes)]

    def submit(
        self, request: GenerateRequest | str | None = None, *, client: Client | None = None, **fields: Any
    ) -> Drawing:
        """Accept a request, or a prompt and the request's other fields by name; its pictures come with the future. Cancelling
        the future stops the work before the next call. client: who asks; clients share the network by their weights, not by
        how much they ask for.

        Raises PlanError for steps the model has no plan for, RequestError for what it cannot draw, BusyError where too
        much waits already, EngineError after `close`.
        """
        return self.start(self.prepare(GenerateRequest.of(request, fields)), client=client)

    def prepare(self, request: GenerateRequest) -> Prepared:
        """A request made ready in the caller's thread: checked, tokenised, its noise drawn. Raises PlanError, RequestError."""
        started = time.perf_counter()
        steps, size = self.check(request)
        guidance = self.manifest.guidance.default if request.guidance is None else request.guidance
        reading = self.tokenizer.read(request.prompt, request.negative_prompt or "")
        tokens, negative = self.tokenizer.encode(reading.text), None
        if guidance > 1 and not self.manifest.guidance.embedded:
            negative = self.tokenizer.encode(reading.negative)
            chunks = max(map(rows_of_prompt, (tokens, negative)))
            tokens, negative = self.tokenizer.padded(tokens, chunks), self.tokenizer.padded(negative, chunks)
        tokenized = time.perf_counter()
        shape, draws = self.manifest.latent_shape_of(size), (0, *(1 + step for step in self._renoised[steps]))
        noises = np.stack([step_noise(request.seed, request.count, shape, draw) for draw in draws], axis=1)
        return Prepared(
            request=request,
            reading=reading,
            tokens=tokens,
            noises=noises,
            size=size,
            steps=steps,
            tokenize=tokenized - started,
            noise_seconds=time.perf_counter() - tokenized,
            guidance=guidance,
            negative=negative,
        )

    def start(
        self, prepared: Prepared, *, client: Client | None = None, reserved: bool = False, since: float | None = None
    ) -> Drawing:
        """Accept what `prepare` gave; cheap enough for any thread. reserved: whatever else waits, for a session, which asks for
        one at a time; since: perf_counter, when it began to wait for the picture that this one is to be. Raises BusyError,
        EngineError, RequestError as `submit`."""
        job = Job(
            prepared, default_deadline=DEFAULT_DEADLINE, client=client, reserved=reserved, since=since, engine=self
        )
        rows = max(1, self.max_batch // 4)  # of a chunk, few, so that chunks of several clients fit into a call
        starts = range(0, prepared.request.count, rows)
        self.batcher.submit([Chunk(job, row, prepared.noises[row : row + rows]) for row in starts])
        return job.future

    def check(self, request: GenerateRequest) -> tuple[int, Size]:
        """The steps and the size that a request means. Raises PlanError, RequestError."""
        steps = self.manifest.default_plan if request.steps is None else request.steps
        select(self._plans, steps)
        check_guidance(request, self.manifest, self.route)
        check_loras(request, self.loras)
        size = check_size(request, self.sizes, self.any_size)
        if request.image is not None:
            check_picture(request.image, request.mask, size, size_name(size))
            check_image(self.manifest, is_read=self.draws_from_pictures)
        if request.condition is not None:
            check_condition(self.manifest)
            check_size_of("condition", request.condition.shape, size, size_name(size))
        return steps, size

    def preview(self, prepared: Prepared) -> Prepared | None:
        """The same in one step, from the same noise; None if that is what it asks for, if there is no such plan, or if it starts
        from a picture of which the noise of one step would leave nothing."""
        if prepared.steps == 1 or 1 not in self._plans or prepared.request.noised < 1:
            return None
        return replace(prepared, request=prepared.request.model_copy(update={"steps": 1}), steps=1)

    def generate(self, request: GenerateRequest | str | None = None, **fields: Any) -> GenerateResult:
        """Draw a request and wait for it: generate("a fox", steps=2, seed=7), or a GenerateRequest with the same fields.

        Raises what `submit` raises, and EngineError for a failing backend, or where the engine's own thread would wait for itself.
        """
        if self.batcher.is_current_thread:
            raise EngineError("generate waits for the thread that it was called in, by a callback: call submit there")
        drawing = self.submit(request, **fields)
        try:
            return drawing.result()
        finally:
            drawing.cancel()  # where the wait was interrupted

    async def agenerate(self, request: GenerateRequest | str | None = None, **fields: Any) -> GenerateResult:
        """Draw a request without blocking the event loop; cancelling the task stops the work before the next call."""
        prepared = await asyncio.to_thread(self.prepare, GenerateRequest.of(request, fields))
        return await asyncio.wrap_future(self.start(prepared))

    async def stream(
        self, request: GenerateRequest | str | None = None, **fields: Any
    ) -> AsyncIterator[GenerateResult]:
        """The request in one step as a preview, then in all its steps, from the same noise."""
        prepared = await asyncio.to_thread(self.prepare, GenerateRequest.of(request, fields))
        if (preview := self.preview(prepared)) is not None:
            yield await asyncio.wrap_future(self.start(preview))
        yield await asyncio.wrap_future(self.start(prepared))

    def close(self) -> None:
        """Free the backend after the call in progress; requests that wait fail, and so do later ones."""
        self.batcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
