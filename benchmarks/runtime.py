"""`bench runtime`: what the engine adds to a backend's bare calls and saves against diffusers; batching, cold start, memory.

Every candidate's picture is checked against torch's of the export, or against onnxruntime's, drawn one at a time. Prompts
are warm: what the text encoder gives is in the cache, and the baselines are given it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from ..core.errors import ImagineFlashError
from ..core.noise import initial_noise
from ..engine import Engine, GenerateRequest, Timings
from ..engine.backends.choosing import choose, installed
from ..engine.loading import EMBEDDED, Route
from ..folders.manifests import ArtifactManifest
from ..folders.reading import read_artifact_manifest
from . import diffusers_student, processes
from .harness import Candidate, measure
from .pictures import ONE_LEVEL, Limits, check_pictures, different_requests, drawn_by_torch, limits_of, precision_of
from .records import save
from .schema import FEWEST_ROUNDS, Case, Check, Record, Timing, new_record

BARE, GENERATE, LOAD = "bare calls", "engine.generate", "Engine.load()"
ALONE, TOGETHER = "one at a time", "together"
QUESTION = (
    "What does the engine add to a backend's bare calls, what does it save against diffusers, and what do batching, cold "
    "start and memory come to?"
)
REST = 0.02  # seconds; torch's threads spin for a few milliseconds
Draw = Callable[[], NDArray[np.uint8]]


def bench_runtime(
    out: Path,
    *,
    model: Path | None = None,
    backends: Sequence[str] = (),
    rounds: int = 200,
    quick: bool = False,
    console: Console | None = None,
) -> Record:
    """Check and time everything, write `out`.json and `out`.png, return the record. rounds: of single pictures; groups get a
    tenth of them, processes a twentieth. console: for progress and what is left out, by default standard error.
    Raises ImagineFlashError for a wrong picture or a backend that is not there."""
    console = console or Console(stderr=True)
    if rounds < FEWEST_ROUNDS:
        raise ImagineFlashError(f"--rounds must be at least {FEWEST_ROUNDS}, got {rounds}; quantiles need them")
    folder = EMBEDDED if model is None else model
    manifest = read_artifact_manifest(folder)
    names = [choose(name, manifest, folder=folder) for name in dict.fromkeys(backends)] or _available(folder, console)
    fewer, fewest = max(FEWEST_ROUNDS, rounds // 10), max(FEWEST_ROUNDS, rounds // 20)
    student = _student(folder, manifest, console)
    parts: list[Callable[[], Iterable[Case]]] = [
        *(partial(overhead, folder, name, "stages", rounds, quick) for name in names),
        *(partial(overhead, folder, name, "sampler", rounds, quick) for name in names if name == "onnxruntime"),
        partial(fastest, folder, names, rounds, student, chosen=not backends),
        *(partial(batching, folder, name, fewer, (1, 4) if quick else (1, 4, 16)) for name in names),
        lambda: [processes.cold_start(folder, manifest, names, fewest, None if quick else student)],
        lambda: [processes.memory(folder, manifest, names, fewest, 500 if quick else 10_000)],
    ]
    rows = [case for part in track(parts, "runtime", console=console) for case in part()]
    record = new_record(QUESTION, rows)
    save(record, out)
    return record


def overhead(folder: Path, backend: str, route: Route, rounds: int, quick: bool = False) -> Iterator[Case]:
    """Per step count, one picture by the engine and by its backend's calls alone.

    "overhead" is the difference of the medians; "outside calls" the median of what the engine's own timings leave to
    itself. Nothing where the artifact has no graph of this route.
    """
    with Engine.load(folder, backend=backend, route=route) as engine:
        if engine.route != route:
            return
        for _, (request, expected) in sorted(drawn_by_torch(folder, engine.artifact).items())[: 1 if quick else None]:
            yield _overhead(engine, request, expected, rounds)


def _overhead(engine: Engine, request: GenerateRequest, expected: NDArray[np.uint8], rounds: int) -> Case:
    timings: list[Timings] = []

    def generate() -> NDArray[np.uint8]:
        result = engine.generate(request)
        timings.append(result.timings)
        return result.images

    case = _measure(
        {BARE: in_own_thread(bare_calls(engine, request)), GENERATE: generate},
        expected,
        rounds,
        _limits(engine),
        {"what": "overhead", **_engine(engine), "route": engine.route, "steps": request.steps},
    )
    ours, bare = case[GENERATE], case[BARE]
    outside = [t.total - sum(t.denoise) - t.decode - sum(t.sampler) for t in timings[-ours.n :]]
    numbers = {
        "overhead ms": round((ours.p50_us - bare.p50_us) / 1e3, 3),
        "overhead %": round(100 * (ours.p50_us / bare.p50_us - 1), 2),
        "outside calls ms": round(1e3 * float(np.median(outside)), 3),
        "p99 / p50": round(ours.p99_us / ours.p50_us, 2),
    }
    return case.with_extra({GENERATE: numbers})


def bare_calls(engine: Engine, request: GenerateRequest) -> Draw:
    """The network's and the decoder's calls of one request, or the one of its sampler graph, on inputs computed here once.

    While it runs, the engine must have nothing to do: its backend takes one thread at a time.
    """
    backend, manifest, steps = engine.backend, engine.artifact, request.steps or max(engine.steps)
    tokens = engine.tokenizer.encode(request.prompt)
    noise = initial_noise(request.seed, 1, manifest.latent_shape)
    if engine.route == "sampler":
        graph, inputs = f"sampler_{steps}", list(tokens.values())
        if "text_encoder" in manifest.graphs and f"{graph}_from_embeddings" in manifest.graphs:
            graph, inputs = f"{graph}_from_embeddings", list(backend.encode(tokens))
        return lambda: backend.sample(graph, inputs, noise)[0]
    conditions, table = backend.encode(tokens), manifest.update_tables()[steps]
    times = manifest.schedule.network_time(table.timesteps).astype(np.float32)
    a, b = table.a.astype(np.float32), table.b.astype(np.float32)
    x, calls = backend.upload(noise), []
    for k in range(steps):
        calls.append((x, times[k : k + 1], conditions))
        x = backend.update(1 * x, backend.denoise(*calls[k]), a[k : k + 1], b[k : k + 1])

    def run() -> NDArray[np.uint8]:
        for call in calls:
            backend.denoise(*call)
        return backend.decode(x)[0]

    return run


def in_own_thread(draw: Draw) -> Draw:
    """Runs it in a thread that does nothing else, for which the caller waits (0.03 ms), as for the engine's.

    Where the thread that waits makes onnxruntime's calls itself, in turn with the engine's, those of the engine are slower
    on two cores: 11.4 ms instead of the 8.5 that they take by themselves, or in turn with a thread such as this one.
    """
    pool = ThreadPoolExecutor(1)
    return lambda: pool.submit(draw).result()


def fastest(
    folder: Path, backends: Sequence[str], rounds: int, student: Path | None, *, chosen: bool = True
) -> Iterator[Case]:
    """One picture in the fewest steps by every backend's bare calls in every precision it takes, by the engine (on the
    backend that it chose itself if `chosen`, else the first), and by diffusers where there is a student. They rest in
    between, since torch's threads spin for a while."""
    with ExitStack() as opened:
        engine = opened.enter_context(Engine.load(folder, backend="auto" if chosen else backends[0]))
        steps, (request, expected) = min(drawn_by_torch(folder, engine.artifact).items())
        draws: dict[str, Draw] = {}
        ours = f"{LOAD}: {engine.backend.name} {precision_of(engine)}"
        limits: dict[str, Limits] = {diffusers_student.NAME: ONE_LEVEL, ours: _limits(engine)}
        if student is not None:
            picture = diffusers_student.picture_of(request, engine.artifact)
            draw = diffusers_student.drawer(student, **picture, warm_prompt=True)
            draws[diffusers_student.NAME] = lambda: np.asarray(draw())
        for backend in backends:
            for precision in dict.fromkeys(("auto", engine.artifact.precision)):
                one = opened.enter_context(Engine.load(folder, backend=backend, precision=precision))
                name = f"{BARE}, {backend} {precision_of(one)}"
                if name not in draws:
                    draws[name], limits[name] = in_own_thread(bare_calls(one, request)), _limits(one)
        draws[ours] = lambda: engine.generate(request).images
        case = _measure(draws, expected, rounds, limits, {"what": "one picture", "steps": steps}, rest=REST)
    least = min(timing.p50_us for timing in case.timings if timing.name.startswith(BARE))
    yield case.with_extra({ours: {"times the fastest bare": round(case[ours].p50_us / least, 3)}})


def batching(folder: Path, backend: str, rounds: int, counts: Sequence[int]) -> Iterator[Case]:
    """N requests of the most steps asked at once, against the same ones after another, in the graphs' own precision. A
    request's latency is from when all were asked until its pictures are there."""
    with Engine.load(folder, backend="onnxruntime") as reference:
        requests = different_requests(reference.artifact, max(counts), max(reference.steps))
        expected = np.concatenate([reference.generate(request).images for request in requests])
    with Engine.load(folder, backend=backend, precision=reference.artifact.precision) as engine:
        engine.warm_up()
        for count in counts:
            latencies: dict[str, list[float]] = {ALONE: [], TOGETHER: []}
            draws: dict[str, Draw] = {
                name: partial(draw_group, engine, requests[:count], seconds, together=name == TOGETHER)
                for name, seconds in latencies.items()
            }
            case = _measure(
                draws,
                expected[:count],
                rounds,
                _limits(engine),
                {"what": "batching", **_engine(engine), "steps": max(engine.steps), "requests": count},
                reference="onnxruntime's pictures",
            )
            yield case.with_extra({t.name: _latencies(latencies[t.name], t, count) for t in case.timings})


def draw_group(
    engine: Engine, requests: Sequence[GenerateRequest], seconds: list[float], *, together: bool
) -> NDArray[np.uint8]:
    """Draws the requests, and adds for each of them the seconds from the call of this function to its pictures."""
    asked, starts, futures = time.perf_counter(), [], []
    for request in requests:
        starts.append(time.perf_counter() - asked)
        futures.append(engine.submit(request))
        if not together:
            futures[-1].result()
    results = [future.result() for future in futures]
    seconds += [start + result.timings.total for start, result in zip(starts, results, strict=True)]
    return np.concatenate([result.images for result in results])


def _latencies(seconds: Sequence[float], timing: Timing, count: int) -> dict[str, float]:
    """Of the requests of all rounds, without those of the check and the warm-up."""
    p50, p95 = np.quantile(seconds[-timing.n * count :], (0.5, 0.95))
    return {
        "latency p50 ms": round(1e3 * float(p50), 2),
        "latency p95 ms": round(1e3 * float(p95), 2),
        "pictures/s": round(1e6 * count / timing.p50_us, 1),
    }


def _measure(
    draws: Mapping[str, Draw],
    expected: NDArray[np.uint8],
    rounds: int,
    limits: Limits | Mapping[str, Limits],
    case: Mapping[str, Any],
    *,
    reference: str = "torch's picture",
    rest: float = 0.0,
) -> Case:
    """The first of `draws` is the baseline. expected: (H, W, 3), or a batch of them. limits: of all, or by candidate."""

    def check(candidate: Candidate) -> Check:
        allowed: Any = limits.get(candidate.name, limits)
        return check_pictures(_batch(candidate.run()), _batch(expected), allowed, reference)

    candidates = [Candidate(name=name, run=run) for name, run in draws.items()]
    return measure(
        candidates, baseline=candidates[0].name, check=check, case=case, warm_up=5, n=rounds, repeats=1, rest=rest
    )


def _batch(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pictures.reshape(-1, *pictures.shape[-3:])


def _limits(engine: Engine) -> Limits:
    return limits_of(engine.artifact, precision_of(engine))


def _engine(engine: Engine) -> dict[str, str]:
    return {"backend": engine.backend.name, "precision": precision_of(engine)}


def _available(folder: Path, console: Console) -> list[str]:
    """The installed backends that take this artifact; of the others a line says why not."""
    names = []
    for name in installed():
        try:
            Engine.load(folder, backend=name).close()
            names.append(name)
        except ImagineFlashError as error:
            console.print(f"{name} is left out: {error}", markup=False)
    if not names:
        raise ImagineFlashError(f"no installed backend takes {folder}; pip install 'imagine-flash[cpu]'")
    return names


def _student(folder: Path, manifest: ArtifactManifest, console: Console) -> Path | None:
    """The student to draw with diffusers, if it draws what the artifact does; else None, and a line says why."""
    try:
        student = diffusers_student.student_of(folder, manifest)
        _, (request, expected) = min(drawn_by_torch(folder, manifest).items())
        draw = diffusers_student.drawer(student, **diffusers_student.picture_of(request, manifest))
        check = check_pictures(np.asarray(draw()), expected, ONE_LEVEL)
        if not check.passed:
            raise ImagineFlashError(f"it draws something else than the artifact, by {check.error:.4g} {check.what}")
        return student
    except ImagineFlashError as error:
        console.print(f"diffusers is left out: {error}", markup=False)
        return None
