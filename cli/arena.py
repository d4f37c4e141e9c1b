"""`imagine-flash arena`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ImagineFlashError
from .common import Quiet, flag, needs, note, progress, say, writable
from .listening import is_loopback, listen, options_as_typed, url_of

if TYPE_CHECKING:
    from ..benchmarks.picture_folders import Shown

_ENTRY = "A folder of pictures, an artifact or student folder, a hub id, or a name of `imagine-flash models`."


def arena_command(
    a: Annotated[str, typer.Argument(metavar="A", help=_ENTRY)],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with, by the same names or prompts.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts for the models to draw, one a line; general: 2,000 that are built in."
        ),
    ] = None,
    steps_a: Annotated[int | None, typer.Option(metavar="INTEGER", help="Steps of A; by default its most.")] = None,
    steps_b: Annotated[int | None, typer.Option(metavar="INTEGER", help="Steps of B; by default its most.")] = None,
    votes: Annotated[Path, typer.Option(metavar="FILE", help="Where votes are kept, as JSON lines.")] = Path(
        "votes.jsonl"
    ),
    results: Annotated[bool, flag("--results", help="Say what the votes in FILE say, and ask nobody.")] = False,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; there are no keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="INTEGER", help="0 takes a free one.")] = 8001,
    quiet: Quiet = False,
) -> None:
    """Ask people, blind, which of two models draws better: a page with pairs of pictures, keys to vote, results with intervals."""
    from ..benchmarks.arena.votes import read_votes

    if results:
        return _say_results(votes)
    writable(votes)
    read_votes(votes)
    needs("serve", "fastapi", "uvicorn")
    from ..benchmarks.arena.app import create_app
    from ..benchmarks.arena.pairs import pairs_of
    from ..distill.data.prompts import read_prompts

    texts = read_prompts(prompts) if prompts else []
    with _listening(host, port) as listening:  # before minutes of drawing
        pairs = pairs_of(_pictures(a, texts, steps_a), _pictures(b, texts, steps_b))
        note(f"{len(pairs)} pairs; votes go to {votes}; Ctrl-C ends it and says the results")
        say(url_of(host, listening))
        _serve(create_app(pairs, votes), listening)
    if votes.exists():
        _say_results(votes)


def _pictures(entry: str, prompts: Sequence[str], steps: int | None) -> dict[str, Shown]:
    """Those of a folder; otherwise the model draws the prompts."""
    from rich.progress import track

    from ..benchmarks.arena.pairs import pictures_drawn
    from ..benchmarks.picture_folders import pictures_in
    from ..engine import Engine
    from ..models.options import ModelOptions
    from .first_run import ready

    folder = Path(entry)
    if folder.is_dir() and (found := pictures_in(folder)):
        return found
    if not prompts:
        here = "holds no pictures" if folder.exists() else "does not exist here"
        raise ImagineFlashError(f"{entry} {here}; a model needs --prompts FILE to draw, one prompt a line")
    with Engine.load(ready(entry, ModelOptions(), "auto", steps=steps)) as engine:
        drawn = pictures_drawn(engine, prompts, steps)
        return dict(track(drawn, entry, total=len(prompts), console=progress()))


def _listening(host: str, port: int) -> socket.socket:
    """Raises RequestError."""
    with options_as_typed({"host", "port"}):
        is_loopback(host)
        return listen(host, port)


def _serve(app: object, listening: socket.socket) -> None:
    """Until a signal ends it."""
    import uvicorn

    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])  # type: ignore[arg-type]
    except KeyboardInterrupt:
        note("")


def _say_results(votes: Path) -> None:
    from ..benchmarks.arena.votes import read_votes, summary

    if not (given := read_votes(votes)):
        raise ImagineFlashError(
            f"{votes} {'holds no votes yet' if votes.exists() else 'does not exist; --votes names another'}"
        )
    found = summary(given)
    say(
        f"A better {found.wins}, neither {found.ties}, B better {found.losses}: {found.votes} votes of {found.annotators} people"
    )
    say(f"A is preferred {found.preference:.1%} (95 % interval {found.interval[0]:.1%} to {found.interval[1]:.1%})")
    say(f"the left one {found.left:.1%}")
    if found.agreement is not None:
        kappa = "" if found.kappa is None else f", kappa {found.kappa:.2f}"
        say(f"two people agree {found.agreement:.1%}{kappa}")
