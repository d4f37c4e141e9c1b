"""What the server, and Ray before it, add to one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ...engine import GenerateRequest
from ...engine.work import GenerateResult
from ..harness import Candidate, Case, Check, measure
from ..pictures import check_pictures, drawn_by_torch
from .bench import HTTP, Bench
from .clients import Answer, HttpClient, StreamClient

GENERATE, STREAM = "engine.generate", "WebSocket"


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
        )
    extra = {name: overhead_of(own[-rounds:]) for name, own in answers.items()}
    return case.with_extra(extra)


def overhead_of(answers: Sequence[Answer]) -> dict[str, float]:
    """What the wire took beyond the engine's own total."""
    p50, p95 = np.quantile([answer.seconds - answer.total for answer in answers], (0.5, 0.95))
    return {"overhead p50 ms": round(1e3 * float(p50), 3), "overhead p95 ms": round(1e3 * float(p95), 3)}
