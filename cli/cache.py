"""`imagine-flash cache`: what was exported and compiled, and how to make room."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .common import examples, flag, note, say, show_help

if TYPE_CHECKING:
    from ..folders.cache import Cached

cache = typer.Typer(
    help="See and clear the cache of exported models and compiled graphs.",
    callback=show_help,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, flag("--json", help="As JSON.")]


@cache.command("list", epilog=examples("cache list", "cache list --json"))
def list_command(json_: Json = False) -> None:
    """List what is in the cache: size, model, and when it was last used."""
    from ..folders.cache import cached, gib
    from ..folders.files import CACHE_VARIABLE, cache_folder

    found = cached()
    if json_:
        _say_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("name", "what", "made of", "size", "last used"):
        table.add_column(heading, no_wrap=heading == "name")
    for one in found:
        table.add_row(one.name, one.kind, one.source, gib(one.bytes), _ago(time.time() - one.used))
    Console().print(table)
    where = cache_folder("")
    note(
        f"{gib(sum(one.bytes for one in found))} in {where}; {CACHE_VARIABLE} sets another place"
        if where
        else "no cache"
    )


@cache.command("remove", epilog=examples("cache remove sd-turbo", "cache remove stabilityai/sd-turbo"))
def remove_command(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names, or what they were made of: cache list.")
    ],
    json_: Json = False,
) -> None:
    """Remove models from the cache; the next run exports them again."""
    from ..folders.cache import remove

    _say_gone(remove(names), json_)


@cache.command("prune", epilog=examples("cache prune", "cache prune --days 7"))
def prune_command(
    days: Annotated[float, typer.Option(metavar="NUMBER", min=0, help="What was not used for so long goes.")] = 30,
    json_: Json = False,
) -> None:
    """Remove what is old, of another version, leads nowhere, or was left half-written by a process that was killed."""
    from ..folders.cache import prune

    _say_gone(prune(days), json_)


def _say_gone(gone: list[Cached], as_json: bool) -> None:
    from ..folders.cache import gib

    if as_json:
        _say_json(gone)
        return
    for one in gone:
        say(f"removed {one.path} ({gib(one.bytes)})")
    note(f"{gib(sum(one.bytes for one in gone))} are free again")


def _say_json(found: list[Cached]) -> None:
    say(json.dumps([{**asdict(one), "path": str(one.path)} for one in found]))


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "now"
