"""What a training says on its way: a progress bar, a line for each update, pictures, figures, and the trackers of accelerate."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image
from pydantic import BaseModel
from rich.console import Console

from ..core.errors import ImagineFlashError, MissingExtraError, nearest
from ..folders.files import atomic_file
from .progress import progress_bar

_EVERY = 10  # updates between two values that trackers are told


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that accelerate does not know, and one whose package is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise ImagineFlashError(f"no tracker {name!r}{nearest(name, known)}; there are {', '.join(known)}")
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"--track {name} needs the package {name}: pip install {name}")


def start_trackers(accelerator: Accelerator, task: str, settings: BaseModel) -> list[Any]:
    """Those that `accelerator` was given, told what the training's settings are."""
    values = settings.model_dump(mode="json")
    plain = {key: v if isinstance(v, int | float | str) else json.dumps(v) for key, v in values.items()}
    accelerator.init_trackers(task, config=plain)
    return list(accelerator.trackers)


class Report:
    """Of one sitting of a task: logs/{task}.csv and previews/{task}-{step}.png in `folder`. A context; only the main process
    says anything."""

    def __init__(
        self, name: str, folder: Path, trackers: Sequence[Any], console: Console | None, *, main: bool = True
    ) -> None:
        self.name, self.folder, self.trackers, self.main = name, folder, trackers, main
        self.losses: list[float] = []
        self._bar, self._open = progress_bar(console, disable=not main), ExitStack()

    def __enter__(self) -> Self:
        path = self.folder / "logs" / f"{self.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = self._open.enter_context(path.open("a"))
        self._open.enter_context(self._bar)
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.finish()
        self._open.close()

    def begin(self, total: int, done: int) -> None:
        """Show the bar of `total` updates."""
        self._shown = self._bar.add_task(self.name, total=total, completed=done)

    @property
    def recent(self) -> float | None:
        """The mean loss of the last hundred updates; None before the first."""
        last = self.losses[-100:]
        return sum(last) / len(last) if last else None

    def update(self, step: int, loss: float, seconds: float) -> None:
        """An update that was made; seconds: since the sitting began."""
        self.losses.append(loss)
        self._bar.update(self._shown, advance=1, description=f"{self.name} loss {self.recent:.4f}")
        if self.main:
            self._lines.write(f"{step},{loss!r},{seconds:.1f}\n")
        if (step + 1) % _EVERY == 0:
            self.figures({"loss": sum(self.losses[-_EVERY:]) / len(self.losses[-_EVERY:])}, step + 1)

    def flush(self) -> None:
        """Write what was said of the updates so far."""
        self._lines.flush()

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Values by name after `step` updates, to the trackers."""
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def picture(self, picture: Image.Image, step: int) -> None:
        """A preview after `step` updates: a file, and to the trackers that take pictures."""
        path = self.folder / "previews" / f"{self.name}-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            picture.save(temporary, format="PNG")
        for tracker in self.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"preview": np.asarray(picture.convert("RGB"))[None]}, step=step)
