"""How far a long work is."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console | None = None, *, width: int = 0, **options: Any) -> Progress:
    """Description, bar, count, and the time so far and to come. console: by default standard error; width: of the description."""
    columns = TextColumn(f"{{task.description:{width or ''}}}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, *times, console=console or Console(stderr=True), **options)
