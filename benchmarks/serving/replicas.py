"""What Ray Serve costs and brings: two replicas beside the server that is one process, on the same machine."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack

from ..harness import Candidate, Case, Check, case_of, measure
from ..pictures import check_pictures, different_requests, drawn_by_torch
from .bench import HTTP, Bench
from .clients import Answer, HttpClient, Server, serving
from .load import CLIENTS, LOAD_ROUNDS, SAMPLED, Load, post_all
from .overhead import overhead_of

ON_RAY, REPLICAS = "HTTP, Ray Serve", 2


def ray_server(bench: Bench) -> AbstractContextManager[Server]:
    """The same model on Ray, each replica with its share of the processors."""
    return serving(bench.folder, bench.engine.backend.name, "--ray", "--replicas", str(REPLICAS), max_queue=4 * CLIENTS)


def overhead_on_ray(bench: Bench, ray: Server, rounds: int) -> Case:
    """One picture in the fewest steps by one client; "overhead" is what the wire took beyond the engine's own total, which
    on Ray is that of an engine with fewer threads."""
    _, (request, expected) = min(drawn_by_torch(bench.folder, bench.engine.artifact).items())
    answers: dict[str, list[Answer]] = {HTTP: [], ON_RAY: []}
    with HttpClient(bench.server.port) as here, HttpClient(ray.port) as there:
        clients = {HTTP: here, ON_RAY: there}

        def draw(name: str) -> Answer:
            answers[name].append(clients[name].draw(request))
            return answers[name][-1]

        def check(candidate: Candidate) -> Check:
            return check_pictures(draw(candidate.name).pixels()[None], expected[None], bench.limits)

        candidates = [Candidate(name=name, run=lambda name=name: draw(name)) for name in clients]
        about = bench.about("overhead on Ray", steps=request.steps, replicas=REPLICAS)
        case = measure(candidates, baseline=HTTP, check=check, case=about, n=rounds, repeats=1)
    return case.with_extra({name: overhead_of(own[-rounds:]) for name, own in answers.items()})


def load_on_ray(bench: Bench, ray: Server, requests: int) -> Case:
    """Rounds of so many requests by 64 clients at once, in the fewest steps: seconds per picture."""
    steps = min(bench.engine.steps)
    wanted = different_requests(bench.engine.artifact, LOAD_ROUNDS * requests, steps)
    sample = wanted[:: max(1, len(wanted) // SAMPLED)]
    found = {name: Load(sample={request.seed for request in sample}) for name in (HTTP, ON_RAY)}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    with ExitStack() as opened:
        clients = {
            name: [opened.enter_context(HttpClient(server.port)) for _ in range(CLIENTS)]
            for name, server in ((HTTP, bench.server), (ON_RAY, ray))
        }
        for name in found:
            post_all(clients[name], wanted[:CLIENTS], Load(sample=set()))
        for number, first in enumerate(range(0, len(wanted), requests)):
            for name, answers in list(found.items())[:: 1 if number % 2 else -1]:  # neither is always first
                started = time.perf_counter()
                post_all(clients[name], wanted[first : first + requests], answers)
                seconds[name].append((time.perf_counter() - started) / requests)
    checks = {
        name: bench.check([answers.kept[seed].pixels() for seed in sorted(answers.kept)], sample)
        for name, answers in found.items()
    }
    case = case_of(
        seconds,
        baseline=HTTP,
        checks=checks,
        repeats=requests,
        case=bench.about("load on Ray", steps=steps, clients=CLIENTS, requests=len(wanted), replicas=REPLICAS),
    )
    share = {ON_RAY: {"% of the throughput": round(100 * sum(seconds[HTTP]) / sum(seconds[ON_RAY]), 1)}}
    return case.with_extra(
        {name: {**share.get(name, {}), **answers.numbers(wanted)} for name, answers in found.items()}
    )
