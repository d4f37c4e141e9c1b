"""`imagine-flash models`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from .common import say


def models_command(json_: Annotated[bool, typer.Option("--json", help="As JSON, with sources.")] = False) -> None:
    """List the few-step models that are known, and what this machine has the memory for."""
    from ..models.catalogue import catalogue
    from ..models.machine import memory_needed, memory_of_this_machine

    here = memory_of_this_machine()
    found: list[dict[str, Any]] = []
    for entry in catalogue().values():
        needed = None if entry.parameters is None else memory_needed(entry.parameters * 1e9)
        fits = None if needed is None or here is None else needed <= here
        found.append({**entry.model_dump(mode="json"), "memory": needed, "fits": fits})
    if json_:
        say(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "steps", "size", "memory", "here"):
        table.add_column(heading, no_wrap=True)
    table.add_column("licence", ratio=1, overflow="fold")
    for one in found:
        said = {True: "yes", False: "no", None: "?"}[one["fits"]]
        amount = f"{one['memory'] / 2**30:.0f} GiB" if one["memory"] else "?"
        size = f"{one['size'][1]}x{one['size'][0]}"
        table.add_row(one["name"], spans(one["steps"]), size, amount, said, one["licence"])
    Console().print(table)
    say(
        "nobody has drawn with these weights through this catalogue yet; use one with: imagine-flash generate PROMPT --model NAME"
    )


def spans(steps: Iterable[int]) -> str:
    """1-4,8: what follows one another as a span."""
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and step == found[-1][-1] + 1:
            found[-1].append(step)
        else:
            found.append([step])
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 2 else ",".join(map(str, span)) for span in found)
