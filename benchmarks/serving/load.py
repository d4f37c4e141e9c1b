"""Many clients at once: what is lost, doubled or refused, and what a picture costs them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Semaphore

from ...engine import Engine, GenerateRequest
from ...engine.processors import processors
from ...engine.work import GenerateResult
from ..harness import case_of
from ..pictures import different_requests
from ..processes import SETTLED
from ..schema import Case
from .bench import CLIENTS, HTTP, ON_RAY, REPLICAS, Bench
from .clients import Answer, Drawn, HttpClient, Server, pixels_of

SUBMIT = "engine.submit"
LOAD_ROUNDS, SAMPLED = 10, 16


@dataclass
class Load:
    """What became of the requests of all rounds. kept: of the pictures of the seeds in `sample`."""

    sample: set[int]
    counts: Counter[str] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)  # by the seed asked for
    kept: dict[int, Drawn] = field(default_factory=dict)

    def numbers(self, wanted: Sequence[GenerateRequest]) -> dict[str, float]:
        """lost: never answered with a picture; doubled: answered with a picture of another seed, or twice."""
        lost = sum(not self.answered[request.seed] for request in wanted)
        doubled = self.counts["another seed"] + sum(times > 1 for times in self.answered.values())
        return {"lost": lost, "doubled": doubled, "5xx": self.counts["5xx"], "429 repeated": self.counts["429"]}


def load(bench: Bench, requests: int) -> Case:
    """So many requests in ten rounds, by 64 clients in the fewest steps, beside the engine alone; "MB grown" is
    the server's, "own" of that what is no page of a file."""
    with _clients(bench.server) as clients:
        ways = {SUBMIT: partial(submit_all, bench.engine), HTTP: partial(post_all, clients)}
        before: list[tuple[float, float]] = []
        case = _rounds(
            bench,
            ways,
            requests,
            "load",
            warm=min(requests, SETTLED),
            begin=lambda: before.append(bench.server.memory()),
        )
        return case.with_extra({HTTP: bench.server.grown(before[0])})


def load_on_ray(bench: Bench, ray: Server, requests: int) -> Case:
    """The same clients at the server and at its replicas on Ray."""
    with _clients(bench.server) as here, _clients(ray) as there:
        ways = {HTTP: partial(post_all, here), ON_RAY: partial(post_all, there)}
        return _rounds(bench, ways, requests, "load on Ray", replicas=REPLICAS)


@contextmanager
def _clients(server: Server) -> Iterator[list[HttpClient]]:
    with ExitStack() as opened:
        yield [opened.enter_context(HttpClient(server.port)) for _ in range(CLIENTS)]


def _rounds(
    bench: Bench,
    ways: Mapping[str, Callable[[Sequence[GenerateRequest], Load], None]],
    requests: int,
    what: str,
    *,
    warm: int = CLIENTS,
    begin: Callable[[], None] = lambda: None,
    **about: int,
) -> Case:
    """So many requests in ten rounds, each of its own seed: seconds per picture, 64 in flight at any time. The first of `ways`
    is the baseline; begin: called when all are warm. "clients' % of processors": of this process, which shares them with the
    server of the other way."""
    steps = min(bench.engine.steps)
    each = max(1, requests // LOAD_ROUNDS)
    wanted = different_requests(bench.engine.artifact, LOAD_ROUNDS * each, steps)
    sample = wanted[:: max(1, len(wanted) // SAMPLED)]
    found = {name: Load(sample={request.seed for request in sample}) for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy = dict.fromkeys(ways, 0.0)
    for way in ways.values():
        way(wanted[: max(CLIENTS, warm)], Load(sample=set()))
    begin()
    for number, first in enumerate(range(0, len(wanted), each)):
        for name in list(ways)[:: 1 if number % 2 else -1]:  # neither is always first
            started, worked = time.perf_counter(), time.process_time()
            ways[name](wanted[first : first + each], found[name])
            seconds[name].append((time.perf_counter() - started) / each)
            busy[name] += time.process_time() - worked
    kept = {name: [pixels_of(own.kept[seed]) for seed in sorted(own.kept)] for name, own in found.items()}
    checks = {name: bench.check(pictures, sample) for name, pictures in kept.items()}
    baseline, other = ways
    case = case_of(
        seconds,
        baseline=baseline,
        checks=checks,
        repeats=each,
        case=bench.about(what, steps=steps, clients=CLIENTS, requests=len(wanted), **about),
    )
    share = {
        other: {
            "% of the throughput": round(100 * sum(seconds[baseline]) / sum(seconds[other]), 1),
            "clients' % of processors": round(100 * busy[other] / (sum(seconds[other]) * each * processors()), 1),
        }
    }
    numbers = {name: own.numbers(wanted) for name, own in found.items() if name != SUBMIT}
    return case.with_extra(share).with_extra(numbers)


def submit_all(engine: Engine, requests: Sequence[GenerateRequest], found: Load) -> None:
    """Draws the requests in this process, as many at once as there are clients."""
    places, futures = Semaphore(CLIENTS), deque[Future[GenerateResult]]()
    for request in requests:
        places.acquire()
        futures.append(engine.submit(request))
        futures[-1].add_done_callback(lambda _: places.release())
    results = [future.result() for future in futures]
    found.kept |= {result.seed: result for result in results if result.seed in found.sample}


def post_all(clients: Sequence[HttpClient], requests: Sequence[GenerateRequest], found: Load) -> None:
    """Every client takes the next request as soon as it has the answer to its last; 429 is repeated until it is drawn."""
    todo = deque(requests)

    def work(client: HttpClient) -> Load:
        own = Load(sample=found.sample)
        client.connect_again()
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
