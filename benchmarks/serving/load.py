"""Many clients at once: what is lost, doubled or refused, and what a picture costs them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Semaphore

import numpy as np
from numpy.typing import NDArray

from ...engine import Engine, GenerateRequest
from ...engine.work import GenerateResult
from ..harness import Case, case_of
from ..pictures import different_requests
from ..processes import SETTLED, NoProcessSize
from .bench import HTTP, Bench
from .clients import Answer, HttpClient, Server

SUBMIT = "engine.submit"
CLIENTS, LOAD_ROUNDS, SAMPLED = 64, 7, 16


@dataclass
class Load:
    """What became of the requests of all rounds. kept: of the pictures of the seeds in `sample`."""

    sample: set[int]
    counts: Counter[str] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)  # by the seed asked for
    kept: dict[int, Answer] = field(default_factory=dict)

    def numbers(self, wanted: Sequence[GenerateRequest]) -> dict[str, float]:
        """lost: never answered with a picture; doubled: answered with a picture of another seed, or twice."""
        lost = sum(not self.answered[request.seed] for request in wanted)
        doubled = self.counts["another seed"] + sum(times > 1 for times in self.answered.values())
        return {"lost": lost, "doubled": doubled, "5xx": self.counts["5xx"], "429 repeated": self.counts["429"]}


def load(bench: Bench, requests: int) -> Case:
    """Rounds of so many requests, each of its own seed, in the fewest steps: seconds per picture, 64 in flight at any time."""
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
        for number, first in enumerate(range(0, len(wanted), requests)):
            group = wanted[first : first + requests]
            for name in (SUBMIT, HTTP) if number % 2 else (HTTP, SUBMIT):  # neither is always first
                started = time.perf_counter()
                if name == SUBMIT:
                    pictures |= submit_all(bench.engine, group, found.sample)
                else:
                    post_all(clients, group, found)
                seconds[name].append((time.perf_counter() - started) / requests)
    over_http = [found.kept[seed].pixels() for seed in sorted(found.kept)]
    checks = {SUBMIT: bench.check([pictures[r.seed] for r in sample], sample), HTTP: bench.check(over_http, sample)}
    case = case_of(
        seconds,
        baseline=SUBMIT,
        checks=checks,
        repeats=requests,
        case=bench.about("load", steps=steps, clients=CLIENTS, requests=len(wanted)),
    )
    grown = {} if before is None else {"MB grown": round(bench.server.resident_mb() - before, 1)}
    share = {"% of the throughput": round(100 * sum(seconds[SUBMIT]) / sum(seconds[HTTP]), 1)}
    return case.with_extra({HTTP: {**share, **found.numbers(wanted), **grown}})


def _resident(server: Server) -> float | None:
    try:
        return server.resident_mb()
    except NoProcessSize as error:
        print(f"memory is left out: {error}")
        return None


def submit_all(engine: Engine, requests: Sequence[GenerateRequest], sample: set[int]) -> dict[int, NDArray[np.uint8]]:
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
