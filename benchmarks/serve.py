"""`bench serve`: what the server adds to the engine, what latest wins saves while somebody types, and what load and
malformed input do to it. A real server process on loopback; its clients are those of `serve_clients`, their prompts warm.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Semaphore

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from ..core.artifact import read_artifact_manifest
from ..core.errors import ImagineFlashError
from ..engine import Engine, GenerateRequest
from ..engine.backends import choose
from ..engine.engine import EMBEDDED
from ..engine.work import GenerateResult
from .harness import FEWEST_ROUNDS, Candidate, Case, Check, Record, case_of, measure, new_record, write_record
from .malformed import malformed, outcome
from .pictures import Limits, check_pictures, different_requests, drawn_by_torch, limits_of, precision_of
from .processes import SETTLED, NoProcessSize
from .records import plot
from .serve_clients import Answer, HttpClient, Server, StreamClient, serving
from .typing_clients import LATEST, QUEUE, Typed, type_in_queue, type_latest_wins

GENERATE, HTTP, STREAM, SUBMIT = "engine.generate", "HTTP", "WebSocket", "engine.submit"
BEFORE, BETWEEN = "before", "between malformed requests"
SENTENCE, SHORT = "a fox on a pink background", "a fox"
CLIENTS, LOAD_ROUNDS, SAMPLED = 64, 5, 16
QUESTION = (
    "What does the server add to the engine, what does latest wins save while somebody types, and what do load and "
    "malformed input do to it?"
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every part needs: the engine in this process, and the same one behind a server."""

    folder: Path
    engine: Engine
    server: Server

    def about(self, what: str, **further: object) -> dict[str, object]:
        return {"what": what, "backend": self.engine.backend.name, "precision": precision_of(self.engine), **further}

    @property
    def limits(self) -> Limits:
        return limits_of(self.engine.artifact, precision_of(self.engine))

    def check(self, got: Sequence[NDArray[np.uint8]], requests: Sequence[GenerateRequest]) -> Check:
        """Pictures against the engine's of the same requests, drawn alone in this process; `overhead` checks against torch's."""
        expected = np.concatenate([self.engine.generate(request).images for request in requests])
        return check_pictures(
            np.stack(got) if got else expected[:0], expected, self.limits, "the engine's, drawn alone"
        )


def bench_serve(
    out: Path, *, model: Path | None = None, backend: str = "auto", rounds: int = 200, quick: bool = False
) -> Record:
    """Check and time everything, write `out`.json and `out`.png, return the record. rounds: of single pictures; a twentieth
    as many sentences are typed. Raises ImagineFlashError for a wrong picture, and for malformed input that is not refused."""
    if rounds < FEWEST_ROUNDS:
        raise ImagineFlashError(f"--rounds must be at least {FEWEST_ROUNDS}, got {rounds}; quantiles need them")
    folder = EMBEDDED if model is None else model
    manifest = read_artifact_manifest(folder)
    backend = choose(backend, manifest, folder=folder)
    with ExitStack() as opened:
        bench = Bench(
            folder=folder,
            engine=opened.enter_context(Engine.load(folder, backend=backend)),
            server=opened.enter_context(serving(folder, backend, max_queue=4 * CLIENTS)),
        )
        bench.engine.warm_up()
        parts = _parts(bench, rounds, quick)
        rows = [case for part in track(parts, description="serve") for case in part()]
    record = new_record(QUESTION, rows)
    write_record(record, out.with_name(f"{out.name}.json"))
    plot(record, out.with_name(f"{out.name}.png"))
    return record


def _parts(bench: Bench, rounds: int, quick: bool) -> list[Callable[[], Iterable[Case]]]:
    drawn = drawn_by_torch(bench.folder, bench.engine.artifact)
    steps = sorted({min(drawn), max(drawn)})
    sentences, text = max(FEWEST_ROUNDS, rounds // 20), SHORT if quick else SENTENCE
    return [
        *(lambda n=n: [overhead(bench, n, rounds)] for n in steps),
        *(lambda n=n: [typing(bench, n, max(2, -(-sentences // n)), text)] for n in ((1, 4) if quick else (1, 4, 16))),
        lambda: [load(bench, CLIENTS if quick else 2000)],
        lambda: [fuzz(bench, 200 if quick else 10_000)],
    ]


def overhead(bench: Bench, steps: int, rounds: int) -> Case:
    """One picture by the engine in this process, over HTTP and over a WebSocket, by one client at a time.

    "overhead" is what an answer took on the wire beyond the engine's own total, which the answer says itself.
    """
    request, expected = drawn_by_torch(bench.folder, bench.engine.artifact)[steps]
    answers: dict[str, list[Answer]] = {HTTP: [], STREAM: []}
    with HttpClient(bench.server.port) as http, StreamClient(bench.server.port) as stream:

        def over(name: str, draw: Callable[[GenerateRequest], Answer]) -> Answer:
            answers[name].append(draw(request))
            return answers[name][-1]

        candidates = [
            Candidate(name=GENERATE, run=lambda: bench.engine.generate(request)),
            Candidate(name=HTTP, run=partial(over, HTTP, http.draw)),
            Candidate(name=STREAM, run=partial(over, STREAM, stream.draw)),
        ]

        def check(candidate: Candidate) -> Check:
            drawn: Answer | GenerateResult = candidate.run()
            pixels = drawn.pixels() if isinstance(drawn, Answer) else drawn.images[0]
            return check_pictures(pixels[None], expected[None], bench.limits)

        case = measure(
            candidates, baseline=GENERATE, check=check, case=bench.about("overhead", steps=steps), n=rounds, repeats=1
        )  # fmt: skip
    extra = {name: _overhead([a.seconds - a.total for a in own[-rounds:]]) for name, own in answers.items()}
    return case.with_extra(extra)


def _overhead(seconds: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.quantile(seconds, (0.5, 0.95))
    return {"overhead p50 ms": round(1e3 * float(p50), 3), "overhead p95 ms": round(1e3 * float(p95), 3)}


def typing(bench: Bench, sessions: int, sentences: int, text: str) -> Case:
    """So many sessions type a sentence at once, in the most steps: seconds from the last key to its picture.

    stale: pictures drawn of a text that was not the newest when they arrived, or never delivered. The prompts of all keys
    were drawn once before, so neither way is given the other's embeddings.
    """
    steps, port = max(bench.engine.steps), bench.server.port
    keys = [text[:i] for i in range(1, len(text) + 1)]
    requests = [[GenerateRequest(prompt=key, seed=seed, steps=steps) for key in keys] for seed in range(sessions)]
    with HttpClient(port) as http:
        for request in requests[0]:
            http.draw(request)
    ways = {QUEUE: type_in_queue, LATEST: type_latest_wins}
    typed: dict[str, list[Typed]] = {name: [] for name in ways}
    drawn: Counter[str] = Counter()
    with ThreadPoolExecutor(sessions) as pool:
        for _ in range(sentences):
            for name, way in ways.items():
                before, start = bench.server.pictures(), time.perf_counter() + 0.1
                futures = [pool.submit(way, port, own, start, i / sessions) for i, own in enumerate(requests)]
                typed[name] += [future.result() for future in futures]
                drawn[name] += int(bench.server.pictures() - before)
    last = [own[-1] for own in requests]
    checks = {name: bench.check([one.picture for one in own[-sessions:]], last) for name, own in typed.items()}
    case = case_of(
        {name: [one.seconds for one in own] for name, own in typed.items()}, baseline=QUEUE, checks=checks,
        case=bench.about("typing", steps=steps, sessions=sessions, keys=len(keys)),
    )  # fmt: skip
    return case.with_extra({name: _typed(own, drawn[name]) for name, own in typed.items()})


def _typed(typed: Sequence[Typed], drawn: int) -> dict[str, float]:
    fresh = sum(one.fresh for one in typed)
    shown = float(np.mean([one.shown / one.typing for one in typed]))
    return {"pictures drawn": drawn, "stale": drawn - fresh, "frames/s while typing": round(shown, 2)}


@dataclass
class Load:
    """What became of the requests of all rounds. kept: of the pictures of the seeds in `sample`."""

    sample: set[int]
    counts: Counter[str] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)  # by the seed asked for
    kept: dict[int, Answer] = field(default_factory=dict)


def load(bench: Bench, requests: int) -> Case:
    """Rounds of so many requests, each of its own seed, in the fewest steps: seconds per picture, 64 in flight at any time.

    lost: never answered with a picture; doubled: answered with a picture of another seed, or twice.
    """
    steps = min(bench.engine.steps)
    wanted = different_requests(bench.engine.artifact, LOAD_ROUNDS * requests, steps)
    sample = wanted[:: max(1, len(wanted) // SAMPLED)]
    found = Load(sample={request.seed for request in sample})
    pictures: dict[int, NDArray[np.uint8]] = {}
    seconds: dict[str, list[float]] = {SUBMIT: [], HTTP: []}
    with ExitStack() as opened:
        clients = [opened.enter_context(HttpClient(bench.server.port)) for _ in range(CLIENTS)]
        warm = wanted[: max(CLIENTS, min(requests, SETTLED))]
        post_all(clients, warm, Load(sample=set()))
        submit_all(bench.engine, warm, set())
        before = _resident(bench.server)
        for first in range(0, len(wanted), requests):
            group = wanted[first : first + requests]
            started = time.perf_counter()
            pictures |= submit_all(bench.engine, group, found.sample)
            middle = time.perf_counter()
            post_all(clients, group, found)
            seconds[SUBMIT].append((middle - started) / requests)
            seconds[HTTP].append((time.perf_counter() - middle) / requests)
    over_http = [found.kept[seed].pixels() for seed in sorted(found.kept)]
    checks = {SUBMIT: bench.check([pictures[r.seed] for r in sample], sample), HTTP: bench.check(over_http, sample)}
    case = case_of(
        seconds, baseline=SUBMIT, checks=checks, repeats=requests,
        case=bench.about("load", steps=steps, clients=CLIENTS, requests=len(wanted)),
    )  # fmt: skip
    lost = sum(not found.answered[request.seed] for request in wanted)
    doubled = found.counts["another seed"] + sum(times > 1 for times in found.answered.values())
    numbers = {"lost": lost, "doubled": doubled, "5xx": found.counts["5xx"], "429 repeated": found.counts["429"]}
    grown = {} if before is None else {"MB grown": round(bench.server.resident_mb() - before, 1)}
    return case.with_extra({HTTP: {**numbers, **grown}})


def _resident(server: Server) -> float | None:
    try:
        return server.resident_mb()
    except NoProcessSize as error:
        print(f"memory is left out: {error}")
        return None


def submit_all(
    engine: Engine, requests: Sequence[GenerateRequest], sample: set[int]
) -> dict[int, NDArray[np.uint8]]:  # fmt: skip
    """Draws the requests in this process, as many at once as there are clients; the pictures of the seeds in `sample`."""
    places, futures = Semaphore(CLIENTS), deque[Future[GenerateResult]]()
    for request in requests:
        places.acquire()
        futures.append(engine.submit(request))
        futures[-1].add_done_callback(lambda _: places.release())
    results = [future.result() for future in futures]
    return {result.seed: result.images[0] for result in results if result.seed in sample}


def post_all(clients: Sequence[HttpClient], requests: Sequence[GenerateRequest], found: Load) -> None:
    """Every client takes the next request as soon as it has the answer to its last; 429 is repeated until it is drawn."""
    todo = deque(requests)

    def work(client: HttpClient) -> Load:
        own = Load(sample=found.sample)
        while todo:
            try:
                request = todo.popleft()
            except IndexError:  # another took the last
                break
            while (got := client.post(request))[0] == 429:
                own.counts["429"] += 1
                time.sleep(0.02)
            _take(own, request, *got)
        return own

    with ThreadPoolExecutor(len(clients)) as pool:
        for own in pool.map(work, clients):
            found.counts += own.counts
            found.answered += own.answered
            found.kept |= own.kept


def _take(found: Load, request: GenerateRequest, status: int, answer: Answer | None) -> None:
    if answer is None:
        found.counts["5xx" if status >= 500 else str(status)] += 1
        return
    found.answered[request.seed] += 1
    found.counts["another seed"] += answer.seed != request.seed
    if request.seed in found.sample:
        found.kept[request.seed] = answer


def fuzz(bench: Bench, count: int) -> Case:
    """So many malformed requests and frames in turn, a good request on a new connection after every 100th; and as many
    good ones before, to compare with. Raises ImagineFlashError for one that is not refused as it should be."""
    _, (request, _) = min(drawn_by_torch(bench.folder, bench.engine.artifact).items())
    every = min(100, count // FEWEST_ROUNDS)
    drawn: dict[str, list[tuple[float, Answer]]] = {BEFORE: [], BETWEEN: []}

    def draw() -> tuple[float, Answer]:
        started = time.perf_counter()
        with HttpClient(bench.server.port) as client:
            answer = client.draw(request)
        return time.perf_counter() - started, answer

    draw()
    drawn[BEFORE] = [draw() for _ in range(count // every)]
    outcomes: Counter[str] = Counter()
    for number, sent in enumerate(malformed(count, seed=0), 1):
        outcomes[outcome(bench.server.port, sent)] += 1
        if number % every == 0:
            drawn[BETWEEN].append(draw())
    if bench.server.process.poll() is not None:
        raise ImagineFlashError(f"the server ended: {bench.server.last_words()}")
    checks = {
        name: bench.check([answer.pixels() for _, answer in own], [request] * len(own)) for name, own in drawn.items()
    }
    case = case_of(
        {name: [seconds for seconds, _ in own] for name, own in drawn.items()}, baseline=BEFORE, checks=checks,
        case=bench.about("malformed requests", requests=count),
    )  # fmt: skip
    return case.with_extra({BETWEEN: {name: outcomes[name] for name in sorted(outcomes)}})
