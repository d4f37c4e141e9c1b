"""`bench serve`: what the server adds to the engine, what latest wins saves while somebody types, what load and a
greedy client do to it. A real server process on loopback; its clients' prompts are warm.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from rich.progress import track

from ..core.errors import ImagineFlashError
from ..engine import Engine
from ..engine.backends.choosing import choose
from ..engine.loading import EMBEDDED
from ..folders.reading import read_artifact_manifest
from .pictures import drawn_by_torch
from .records import save
from .schema import FEWEST_ROUNDS, Case, Record, new_record
from .serving.bench import CLIENTS, REPLICAS, Bench
from .serving.clients import serving
from .serving.greedy import beside_a_greedy_client
from .serving.load import load, load_on_ray
from .serving.overhead import overhead, overhead_on_ray
from .serving.typing import typing

SENTENCE, SHORT = "a fox on a pink background", "a fox"
QUESTION = (
    "What does the server add to the engine, what does latest wins save while somebody types, and what do load and a "
    "greedy client do to it?"
)


def bench_serve(
    out: Path, *, model: Path | None = None, backend: str = "auto", rounds: int = 200, quick: bool = False
) -> Record:
    """Check and time everything, write `out`.json and `out`.png, return the record. rounds: of single pictures; a twentieth
    as many sentences are typed. Raises ImagineFlashError for a wrong picture."""
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
    save(record, out)
    return record


def _parts(bench: Bench, rounds: int, quick: bool) -> list[Callable[[], Iterable[Case]]]:
    drawn = drawn_by_torch(bench.folder, bench.engine.artifact)
    steps = sorted({min(drawn), max(drawn)})
    sentences, text = max(FEWEST_ROUNDS, rounds // 20), SHORT if quick else SENTENCE
    return [
        *(lambda n=n: [overhead(bench, n, rounds)] for n in steps),
        *(
            lambda n=n: [typing(bench, n, max(2, -(-sentences // n)), text)]
            for n in ((1, 4) if quick else (1, 4, 16, 100))
        ),
        lambda: [load(bench, CLIENTS if quick else 1500)],
        lambda: [beside_a_greedy_client(bench, rounds)],
        lambda: on_ray(bench, rounds, CLIENTS if quick else 300),
    ]


def on_ray(bench: Bench, rounds: int, requests: int) -> list[Case]:
    """The rows of two replicas; none where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        print('Ray Serve is left out: pip install "imagine-flash[ray]"')
        return []
    options = ("--ray", "--replicas", str(REPLICAS))
    with serving(bench.folder, bench.engine.backend.name, *options, max_queue=4 * CLIENTS) as ray:
        return [overhead_on_ray(bench, ray, rounds), load_on_ray(bench, ray, requests)]
