"""SIGTERM while a server is asked for much: how long it takes to end, and what becomes of what it has accepted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Event

from ...core.errors import ImagineFlashError
from ...engine import GenerateRequest
from ..harness import case_of
from ..pictures import drawn_by_torch
from ..schema import FEWEST_ROUNDS, Case
from .bench import Bench
from .bombs import Bomber, an_edit, jpeg_bomb
from .clients import Answer, HttpClient, Server, StreamClient, serving
from .greedy import ask_for_much
from .malformed import malformed
from .refusals import outcome

IDLE, REQUESTS, MALFORMED, BOMBS, GREEDY, TYPING = "idle", "requests", "malformed", "bombs", "a greedy client", "typing"
MOMENTS = (IDLE, REQUESTS, MALFORMED, BOMBS, GREEDY, TYPING)
CLIENTS, AT_WORK, ANNOUNCED = 12, 1.0, 0.3  # seconds of work before the end is announced, and from then to the signal
LONGEST = 60.0  # seconds


@dataclass
class Told:
    """What a client of a server that ends was told. lost: requests that it had sent before the end was announced, and that
    were not answered."""

    answers: list[Answer] = field(default_factory=list)
    lost: int = 0


def ending(bench: Bench, moments: Sequence[str] = MOMENTS) -> Case:
    """Seconds from SIGTERM to the end of the process, of a server that does nothing and of busy ones, each started anew.

    "lost" counts HTTP requests that were in the server's hands; with "typing", WebSockets that ended without the code 1012,
    which tells pages to come again. Raises ImagineFlashError for a server that does not end.
    """
    _, (request, _) = min(drawn_by_torch(bench.folder, bench.engine.artifact).items())
    seconds: dict[str, list[float]] = {}
    numbers: dict[str, Counter[str]] = {}
    answers: dict[str, list[Answer]] = {}
    for name in moments:
        seconds[name], numbers[name], answers[name] = [], Counter({"answered": 0, "lost": 0}), []
        for _ in range(FEWEST_ROUNDS):
            with serving(bench.folder, bench.engine.backend.name, max_queue=128) as server:
                with HttpClient(server.port) as client:
                    answers[name].append(client.draw(request))  # also the only one of the idle server
                with _beside(bench, name, server), ThreadPoolExecutor(CLIENTS) as pool:
                    told = _end(server, name, request, pool, seconds[name])
            numbers[name] += Counter(answered=sum(len(one.answers) for one in told), lost=sum(one.lost for one in told))
            answers[name] += [answer for one in told for answer in one.answers[-1:]]
    checks = {name: bench.check([a.pixels() for a in own], [request] * len(own)) for name, own in answers.items()}
    case = case_of(seconds, baseline=IDLE, checks=checks, case=bench.about("SIGTERM", clients=CLIENTS))
    extra = {
        n: {"slowest s": round(max(seconds[n]), 2), **{k: numbers[n][k] for k in ("answered", "lost")}} for n in seconds
    }
    return case.with_extra(extra)


def _end(
    server: Server, name: str, request: GenerateRequest, pool: ThreadPoolExecutor, seconds: list[float]
) -> list[Told]:
    """Has clients at work, then ends the server."""
    announced = Event()
    ask = {IDLE: None, TYPING: _type, MALFORMED: _send_malformed}.get(name, _draw)
    clients = [pool.submit(ask, server, request, announced) for _ in range(CLIENTS)] if ask else []
    time.sleep(AT_WORK)
    announced.set()
    time.sleep(ANNOUNCED)
    started = time.perf_counter()
    server.process.terminate()
    server.process.wait(LONGEST)
    seconds.append(time.perf_counter() - started)
    return [client.result() for client in clients]


@contextmanager
def _beside(bench: Bench, name: str, server: Server) -> Iterator[None]:
    """Who else is there."""
    over = Event()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask_for_much, server.port, over) if name == GREEDY else None
        request, _ = an_edit(bench)
        with Bomber(server, jpeg_bomb(), request) if name == BOMBS else nullcontext():
            yield
        over.set()
        if other is not None:
            with suppress(OSError, HTTPException):
                other.result()


def _draw(server: Server, request: GenerateRequest, announced: Event) -> Told:
    told = Told()
    with HttpClient(server.port) as client:
        while True:
            late = announced.is_set()
            status, answer = client.post(request)
            if answer is not None:
                told.answers.append(answer)
            elif status == 429:
                time.sleep(0.02)
            else:
                told.lost += not late
                return told


def _send_malformed(server: Server, request: GenerateRequest, announced: Event) -> Told:
    with suppress(ImagineFlashError, OSError):  # nobody is there any more
        for sent in malformed(10**6, seed=0):
            outcome(server.port, sent)
            if server.process.poll() is not None:
                break
    return Told()


def _type(server: Server, request: GenerateRequest, announced: Event) -> Told:
    from websockets.exceptions import ConnectionClosed

    told = Told()
    with StreamClient(server.port) as stream:
        try:
            while True:
                told.answers.append(stream.draw(request))
        except ConnectionClosed as closed:
            told.lost = closed.rcvd is None or closed.rcvd.code != 1012
    return told
