"""What the server, and Ray before it, add to one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...engine import GenerateRequest
from ..harness import Candidate, measure
from ..pictures import check_pictures, drawn_by_torch
from ..schema import Case, Check
from .bench import HTTP, ON_RAY, REPLICAS, Bench
from .clients import Answer, Drawn, HttpClient, Server, StreamClient, pixels_of

GENERATE, STREAM = "engine.generate", "WebSocket"


def overhead(bench: Bench, steps: int, rounds: int) -> Case:
    """One picture by the engine in this process, over HTTP and over a WebSocket, by one client at a time."""
    with HttpClient(bench.server.port) as http, StreamClient(bench.server.port) as stream:
        ways = {GENERATE: bench.engine.generate, HTTP: http.draw, STREAM: stream.draw}
        return _one_picture(bench, ways, steps, rounds, bench.about("overhead", steps=steps))


def overhead_on_ray(bench: Bench, ray: Server, rounds: int) -> Case:
    """One picture in the fewest steps by one client; on Ray, "overhead" is beyond the total of an engine with fewer threads."""
    steps = min(drawn_by_torch(bench.folder, bench.engine.artifact))
    with HttpClient(bench.server.port) as here, HttpClient(ray.port) as there:
        about = bench.about("overhead on Ray", steps=steps, replicas=REPLICAS)
        return _one_picture(bench, {HTTP: here.draw, ON_RAY: there.draw}, steps, rounds, about)


def _one_picture(
    bench: Bench, ways: Mapping[str, Callable[[GenerateRequest], Drawn]], steps: int, rounds: int, about: dict
) -> Case:
    """The first of `ways` is the baseline. "overhead" is what an answer took on the wire beyond the engine's own total,
    which the answer says itself."""
    request, expected = drawn_by_torch(bench.folder, bench.engine.artifact)[steps]
    answers: dict[str, list[Answer]] = {name: [] for name in ways}

    def draw(name: str) -> Drawn:
        drawn = ways[name](request)
        if isinstance(drawn, Answer):
            answers[name].append(drawn)
        return drawn

    def check(candidate: Candidate) -> Check:
        return check_pictures(pixels_of(candidate.run())[None], expected[None], bench.limits)

    candidates = [Candidate(name=name, run=lambda name=name: draw(name)) for name in ways]
    case = measure(candidates, baseline=candidates[0].name, check=check, case=about, n=rounds, repeats=1, rest=0.02)
    return case.with_extra({name: overhead_of(own[-rounds:]) for name, own in answers.items() if own})


def overhead_of(answers: Sequence[Answer]) -> dict[str, float]:
    """What the wire took beyond the engine's own total."""
    p50, p95 = np.quantile([answer.seconds - answer.total for answer in answers], (0.5, 0.95))
    return {"overhead p50 ms": round(1e3 * float(p50), 3), "overhead p95 ms": round(1e3 * float(p95), 3)}
