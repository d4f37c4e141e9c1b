"""A request on its way through the engine: one job, drawn in chunks of images that move together."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RequestError
from ..folders.manifests import Size
from .backends.base import Array, Conditions, LoraSet, Stopped, stopwatch
from .editing import Start, restore
from .request import GenerateRequest
from .saving import save_images
from .tokenizer import Reading, Tokens

T = TypeVar("T")
NOT_OURS = (
    InvalidStateError,
    SystemExit,
)  # of a future: cancelled meanwhile; a callback that would end the engine's thread


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of one request; a call that it shared with others counts whole. Stages by the device's clock, where that is a GPU,
    the rest by the wall's.

    queue: the rest of the total, waiting before and between its calls. adapt: writing other LoRAs into the networks.
    denoise: one entry per network call. copy: to and from the device, joining and splitting batches. sampler: of
    whole-sampler graphs, which have no other stages. total: from the call to the pictures.
    """

    tokenize: float = 0.0
    noise: float = 0.0
    queue: float = 0.0
    adapt: float = 0.0
    encode: float = 0.0
    denoise: tuple[float, ...] = ()
    update: float = 0.0
    decode: float = 0.0
    copy: float = 0.0
    sampler: tuple[float, ...] = ()
    total: float = 0.0

    def stages(self) -> dict[str, float]:
        """The stages that took part, in order, calls of one kind added up."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        summed = {name: sum(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: seconds for name, seconds in summed.items() if seconds > 0}


@dataclass(frozen=True, kw_only=True, repr=False)
class GenerateResult:
    """images: uint8 (N, H, W, 3). seed: of the first picture, the others follow it. cached: the prompt's embeddings were known.

    unknown_words: of the prompt, those that training never showed, which were left out; replaced_words: typos, and what was
    read instead; cut, cut_negative: the end of a long prompt, and of a long negative one, which the model does not read.
    guidance: the scale that it was drawn with; loras: the LoRAs and their weights.
    """

    images: NDArray[np.uint8]
    timings: Timings
    steps: int
    seed: int
    unknown_words: list[str]
    replaced_words: dict[str, str] = field(default_factory=dict)
    cut: str = ""
    cut_negative: str = ""
    cached: bool = False
    prompt: str = ""
    guidance: float = 1.0
    loras: LoraSet = ()

    def __repr__(self) -> str:
        count, height, width = self.images.shape[:3]
        seconds = f"{1000 * self.timings.total:.1f} ms"
        return f"<GenerateResult {count} x {width}x{height}, {self.steps} steps, seed {self.seed}, {seconds}>"

    def caption(self, i: int = 0) -> str:
        """What drew picture i, as other programs write it into a PNG."""
        return f"{self.asked}\nSteps: {self.steps}, Seed: {self.seed + i}"

    @property
    def asked(self) -> str:
        """The prompt, with the LoRAs as A1111's clients write them into it."""
        return " ".join([self.prompt, *(f"<lora:{name}:{weight:g}>" for name, weight in self.loras)])

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures as PNG, JPEG or WebP by the path's ending, numbered where there are several; returns the paths.
        Raises ImagineFlashError for what cannot be written."""
        return save_images(self.images, Path(path), [self.caption(i) for i in range(len(self.images))])


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request with what the caller's thread made of it, and the seconds that it took.

    noises: (count, 1 + k, C, h, w): what x_T is made of, and the fresh noise of each of the plan's k steps that take some.
    guidance: the scale that it is drawn with; negative: what the prompt is weighed against, where two rows a picture are.
    """

    request: GenerateRequest
    reading: Reading = field(repr=False)
    tokens: Tokens = field(repr=False)
    noises: NDArray[np.float32] = field(repr=False)
    size: Size
    steps: int
    tokenize: float
    noise_seconds: float
    guidance: float = 1.0
    negative: Tokens | None = field(default=None, repr=False)


class Drawing(Future[GenerateResult]):
    """A request's pictures, once they are there. begun: its first network call was made. engine: what draws it, kept until it is
    done, however its maker forgets it."""

    begun = False

    def __init__(self, engine: object = None) -> None:
        super().__init__()
        self._engine, self._untold = engine, threading.Lock()
        self.add_done_callback(lambda done: setattr(done, "_engine", None))

    def cancel(self) -> bool:
        """Stops the work before the next call. Wakes who waits for several futures too, which `Future.cancel` leaves to what runs
        them."""
        if not super().cancel():
            return False
        if self._untold.acquire(blocking=False):  # once
            self.set_running_or_notify_cancel()
        return True


@dataclass(frozen=True)
class Client:
    """Who asks, for the fair share: one of weight 2 is given twice as much where all want more than there is. Raises
    RequestError for a name that is no text and a weight that is not above 0."""

    name: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RequestError(f"a client's name must be a text, got {self.name!r}")
        if not (isinstance(self.weight, (int, float)) and 0 < self.weight < float("inf")):
            raise RequestError(f"a client's weight must be a number above 0, got {self.weight!r}")


class Job:
    """One request on its way, and what the worker found out. deadline: perf_counter; rank: the earliest of a client goes first.

    reserved: it has a place of its own, whatever else waits.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        default_deadline: float,
        client: Client | None = None,
        reserved: bool = False,
        since: float | None = None,
        engine: object = None,
    ) -> None:
        """default_deadline: seconds, how a request without a timeout ranks among those that have one. since: perf_counter,
        the moment it ranks by where it takes the place of an older one. engine: kept until the job is done."""
        self.client, self.reserved = client or Client(), reserved
        self.request, self.tokens, self.size, self.steps = (
            prepared.request,
            prepared.tokens,
            prepared.size,
            prepared.steps,
        )
        self.prepared = prepared
        self.started = time.perf_counter() - prepared.tokenize - prepared.noise_seconds
        self.expires = self.request.timeout is not None
        self.deadline = self.started + (self.request.timeout or default_deadline)
        self.rank = self.deadline + min(0.0, (since or self.started) - self.started)
        self.future = Drawing(engine)
        self.seconds: dict[str, list[Stopped]] = {}
        self.stopwatch = stopwatch  # the backend's, once the job is with one
        self.pictures: dict[int, NDArray[np.uint8]] = {}  # by the row of a chunk's first picture
        self.cached = False
        self.negative, self.guidance = prepared.negative, prepared.guidance
        self.loras = prepared.request.loras
        self.conditions: Conditions = ()  # of the prompt, one row; () until it is encoded
        self.against: Conditions = ()  # of the negative prompt, where there is one
        self.start: Start | None = None  # the picture it is drawn from
        self.control: Conditions = ()  # of the conditioning picture, one row; () until it is read

    @property
    def is_cancelled(self) -> bool:
        return self.future.cancelled()

    def spent(self, stage: str, seconds: Stopped) -> None:
        self.seconds.setdefault(stage, []).append(seconds)

    def fail(self, error: BaseException) -> None:
        """The request ends in an error, unless it has ended already."""
        with suppress(*NOT_OURS):
            self.future.set_exception(error)

    def finish(self, row: int, images: NDArray[np.uint8]) -> None:
        """Takes a chunk's pictures; with the last of them the request is answered."""
        self.pictures[row] = images
        if sum(map(len, self.pictures.values())) < self.request.count:
            return
        images = np.concatenate([self.pictures[row] for row in sorted(self.pictures)])
        if self.request.image is not None and self.request.mask is not None:
            images = restore(images, self.request.image, self.request.mask)
        result = GenerateResult(
            images=images,
            timings=self._timings(),
            steps=self.steps,
            seed=self.request.seed,
            unknown_words=self.prepared.reading.unknown,
            replaced_words=self.prepared.reading.replaced,
            prompt=self.request.prompt,
            cut=self.prepared.reading.cut,
            cut_negative=self.prepared.reading.cut_negative,
            cached=self.cached,
            guidance=self.guidance,
            loras=self.loras,
        )
        with suppress(*NOT_OURS):
            self.future.set_result(result)

    def _timings(self) -> Timings:
        spent = {stage: [stopped() for stopped in calls] for stage, calls in self.seconds.items()}

        def summed(stage: str) -> float:
            return sum(spent.get(stage, ()))

        total = time.perf_counter() - self.started
        tokenize, noise = self.prepared.tokenize, self.prepared.noise_seconds
        at_work = tokenize + noise + sum(map(sum, spent.values()))
        return Timings(
            tokenize=tokenize,
            noise=noise,
            queue=max(0.0, total - at_work),
            adapt=summed("adapt"),
            encode=summed("encode"),
            denoise=tuple(spent.get("denoise", ())),
            update=summed("update"),
            decode=summed("decode"),
            copy=summed("copy"),
            sampler=tuple(spent.get("sampler", ())),
            total=total,
        )


@dataclass(eq=False)
class Chunk:
    """Some pictures of a job, all at the same step. row: of the first among the job's pictures. x: latents (n, C, h, w).

    noises: (n, 1 + k, C, h, w), as a request's. conditions: of the prompt; against: of the negative prompt, or ().
    """

    job: Job
    row: int
    noises: NDArray[np.float32]
    x: Array = None
    conditions: Conditions = ()
    against: Conditions = ()
    step: int = 0  # the next of the plan
    turn: float | None = None  # in the fair order, once it has begun
    start: Start | None = None  # the picture it is drawn from

    @property
    def rows(self) -> int:
        return len(self.noises)

    @property
    def noise(self) -> NDArray[np.float32]:
        """Unit noise (n, C, h, w), what x_T is made of."""
        return np.ascontiguousarray(self.noises[:, 0])

    @property
    def network_rows(self) -> int:
        """Of a call of the denoiser: two a picture where the prompt is weighed against another."""
        return self.rows * (1 if self.job.negative is None else 2)

    @property
    def is_drawn(self) -> bool:
        """Whether it has had all its steps, and only needs decoding."""
        return self.step == self.job.steps

    @cached_property
    def cost(self) -> float:
        """Rows of network calls, by its client's weight."""
        return self.network_rows * self.job.steps / self.job.client.weight


def by_job(chunks: Iterable[Chunk]) -> dict[Job, list[Chunk]]:
    found: dict[Job, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.job, []).append(chunk)
    return found


def rows_of(chunks: Sequence[Chunk]) -> list[slice]:
    """Where each chunk's pictures lie in the joined batch."""
    ends = itertools.accumulate(chunk.rows for chunk in chunks)
    return [slice(end - chunk.rows, end) for chunk, end in zip(chunks, ends, strict=True)]


def timed(jobs: Sequence[Job], stage: str, work: Callable[[], T]) -> T:
    """What `work` gives; its seconds count for each of the jobs."""
    stop = jobs[0].stopwatch()
    value = work()
    seconds = stop()
    for job in jobs:
        job.spent(stage, seconds)
    return value
