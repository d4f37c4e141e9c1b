"""Somebody who types: one request per key with the whole text so far, shown by a server that draws the newest text, or by
one that draws every text in order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...engine import GenerateRequest
from ..harness import case_of
from ..schema import Case
from .bench import Bench
from .clients import HttpClient, StreamClient

LATEST, QUEUE = "latest wins", "every key in turn"
KEYS_PER_SECOND = 12


@dataclass(frozen=True, kw_only=True)
class Typed:
    """One sentence of one session. seconds: from the last key to its picture, `picture`; typing: from the first key to the
    last; shown: pictures that arrived meanwhile; late: after it; fresh: of all, those whose text was the newest when they came."""

    seconds: float
    typing: float
    shown: int
    late: int
    fresh: int
    picture: NDArray[np.uint8]


def _due(requests: Sequence[GenerateRequest], start: float, phase: float) -> list[float]:
    """When each key is pressed. phase: 0 to 1 of the time between keys, so that sessions don't press theirs together."""
    return [start + (i + phase) / KEYS_PER_SECOND for i in range(len(requests))]


def type_latest_wins(port: int, requests: Sequence[GenerateRequest], start: float, phase: float) -> Typed:
    """Over a WebSocket: every key is sent when it is pressed. Raises ImagineFlashError."""
    due = _due(requests, start, phase)
    shown = fresh = late = 0
    with StreamClient(port) as stream:
        for request, moment in zip(requests, due, strict=True):
            while (left := moment - time.perf_counter()) > 0:
                try:
                    seq, _ = stream.receive(left)
                except TimeoutError:
                    break
                shown, fresh = shown + 1, fresh + (seq == stream.newest)
            stream.send(request)
        while True:
            seq, answer = stream.receive()
            late += 1
            if seq == len(requests):
                seconds = time.perf_counter() - due[-1]
                return Typed(
                    seconds=seconds,
                    typing=due[-1] - due[0],
                    shown=shown,
                    late=late,
                    fresh=fresh + 1,
                    picture=answer.pixels(),
                )


def type_in_queue(port: int, requests: Sequence[GenerateRequest], start: float, phase: float) -> Typed:
    """Over HTTP on one connection: every key's picture is asked for after the answer to the one before, or when the key is
    pressed if that is later. Raises ImagineFlashError."""
    due = _due(requests, start, phase)
    shown = fresh = 0
    with HttpClient(port) as http:
        for i, (request, moment) in enumerate(zip(requests, due, strict=True)):
            time.sleep(max(0.0, moment - time.perf_counter()))
            answer = http.draw(request)
            arrived = time.perf_counter()
            shown += arrived < due[-1]
            fresh += i + 1 == len(requests) or arrived < due[i + 1]
    return Typed(
        seconds=arrived - due[-1],
        typing=due[-1] - due[0],
        shown=shown,
        late=len(requests) - shown,
        fresh=fresh,
        picture=answer.pixels(),
    )


def typing(bench: Bench, sessions: int, sentences: int, text: str) -> Case:
    """So many sessions type a sentence at once, in the most steps: seconds from the last key to its picture.

    never shown: pictures drawn and not sent, because a newer text had come; stale: these, and those of a text that was no
    longer the newest when they arrived. The prompts of all keys were drawn once before, so neither way is given the other's
    embeddings.
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
        {name: [one.seconds for one in own] for name, own in typed.items()},
        baseline=QUEUE,
        checks=checks,
        case=bench.about("typing", steps=steps, sessions=sessions, keys=len(keys)),
    )
    return case.with_extra({name: _typed(own, drawn[name]) for name, own in typed.items()})


def _typed(typed: Sequence[Typed], drawn: int) -> dict[str, float]:
    fresh, sent = sum(one.fresh for one in typed), sum(one.shown + one.late for one in typed)
    rate = float(np.mean([one.shown / one.typing for one in typed]))
    return {
        "pictures drawn": drawn,
        "never shown": drawn - sent,
        "stale": drawn - fresh,
        "frames/s while typing": round(rate, 2),
    }
