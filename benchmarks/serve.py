"""`bench serve`: what the server adds to the engine, what latest wins saves while somebody types, and what load and a greedy
client do to it. A real server process on loopback; its clients' prompts are warm.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ..core.errors import ImagineFlashError, nearest
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
from .serving.load import LOAD_ROUNDS, load, load_on_ray
from .serving.overhead import overhead, overhead_on_ray
from .serving.typing import typing

SENTENCE, SHORT = "a fox on a pink background", "a fox"
PARTS = ("overhead", "typing", "load", "greedy", "ray")
FEWEST_REQUESTS = LOAD_ROUNDS * CLIENTS
QUESTION = (
    "What does the server add to the engine, what does latest wins save while somebody types, and what do load and a greedy "
    "client do to it?"
)


def bench_serve(
    out: Path,
    *,
    model: Path | None = None,
    backend: str = "auto",
    rounds: int = 200,
    requests: int = 10_000,
    only: Collection[str] = (),
    quick: bool = False,
    console: Console | None = None,
) -> Record:
    """Check and time everything, write `out`.json and `out`.png after each part, return the record. rounds: of single pictures;
    a twentieth as many sentences are typed. requests: of "load". only: some of PARTS; none is all.
    console: for progress and what is left out, by default standard error. Raises ImagineFlashError for a wrong picture."""
    _refuse_settings(rounds, requests, only)
    folder, console = EMBEDDED if model is None else model, console or Console(stderr=True)
    manifest = read_artifact_manifest(folder)
    backend = choose(backend, manifest, folder=folder)
    with ExitStack() as opened:
        bench = Bench(
            folder=folder,
            engine=opened.enter_context(Engine.load(folder, backend=backend)),
            server=opened.enter_context(serving(folder, backend, max_queue=4 * CLIENTS)),
        )
        bench.engine.warm_up()
        parts = _parts(bench, rounds, FEWEST_REQUESTS if quick else requests, quick, console)
        chosen = [part for name in PARTS if not only or name in only for part in parts[name]]
        record, rows = None, []
        for part in track(chosen, "serve", console=console):
            rows += part()
            if rows:
                record = new_record(QUESTION, rows)
                save(record, out)
    if record is None:
        raise ImagineFlashError(f"nothing of {', '.join(only)} can be measured here")
    return record


def _refuse_settings(rounds: int, requests: int, only: Collection[str]) -> None:
    if rounds < FEWEST_ROUNDS:
        raise ImagineFlashError(f"--rounds must be at least {FEWEST_ROUNDS}, got {rounds}; quantiles need them")
    if requests < FEWEST_REQUESTS:
        raise ImagineFlashError(
            f"--requests must be at least {FEWEST_REQUESTS}, got {requests}; {CLIENTS} are sent at once"
        )
    for name in only:
        if name not in PARTS:
            raise ImagineFlashError(f"--only must be of {', '.join(PARTS)}, got {name!r}{nearest(name, PARTS)}")


def _parts(
    bench: Bench, rounds: int, requests: int, quick: bool, console: Console
) -> dict[str, list[Callable[[], Iterable[Case]]]]:
    """What is measured, by its name in PARTS, in pieces for the progress bar."""
    drawn = drawn_by_torch(bench.folder, bench.engine.artifact)
    sentences, text = max(FEWEST_ROUNDS, rounds // 20), SHORT if quick else SENTENCE
    crowds = (1, 4) if quick else (1, 4, 16, 100)
    return {
        "overhead": [lambda n=n: [overhead(bench, n, rounds)] for n in sorted({min(drawn), max(drawn)})],
        "typing": [lambda n=n: [typing(bench, n, max(2, -(-sentences // n)), text)] for n in crowds],
        "load": [lambda: [load(bench, requests)]],
        "greedy": [lambda: [beside_a_greedy_client(bench, rounds)]],
        "ray": [lambda: on_ray(bench, rounds, requests // 5, console)],
    }


def on_ray(bench: Bench, rounds: int, requests: int, console: Console) -> list[Case]:
    """The rows of two replicas; none where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        console.print('Ray Serve is left out: pip install "imagine-flash[ray]"', markup=False)
        return []
    options = ("--ray", "--replicas", str(REPLICAS))
    with serving(bench.folder, bench.engine.backend.name, *options, max_queue=4 * CLIENTS) as ray:
        return [overhead_on_ray(bench, ray, rounds), load_on_ray(bench, ray, requests)]
