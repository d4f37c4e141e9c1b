"""Drawing and reading the pictures of one method, in shards that a killed evaluation goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from ...core.errors import ArtifactError
from ...folders.files import atomic_file
from .judge import Judge
from .method import Method
from .metrics import sharpness
from .prompts import Prompts, marks

SHARD, BATCH = 1024, 64
KINDS = ("seen", "held_out", "diversity")
Shards = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one method's pictures of one set of prompts came to: rows are prompts."""

    features: np.ndarray  # (N, D) float64, of the judge
    marks: np.ndarray  # (N, 5) int8: see prompts.marks
    sharpness: np.ndarray  # (N,)
    latents: np.ndarray  # (N, C, h, w) float16; (N, 0) where the method has none
    seconds: float  # drawing, without reading


class PictureStore:
    """A folder of shards; `identity` is of all that pictures depend on, so that no two evaluations mix."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, note = folder, folder / "evaluation.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            with atomic_file(note) as temporary:
                Path(temporary).write_text(json.dumps({"identity": identity}), encoding="utf-8")
        if json.loads(note.read_text(encoding="utf-8")).get("identity") != identity:
            raise ArtifactError(
                f"{folder} holds pictures of other models, prompts or code; choose another OUTPUT or delete it"
            )

    def measure(self, method: Method, prompts: Prompts, kind: str, judge: Judge, bar: Progress) -> Measured:
        """Draw what is missing and read everything."""
        task = bar.add_task(f"{method.name} ({kind})", total=len(prompts))
        parts = []
        for first in range(0, len(prompts), SHARD):
            path = self.folder / _slug(method.name) / f"{kind}-{first:06d}.npz"
            part = prompts[slice(first, first + SHARD)]
            if not _is_of(path, part):
                drawn = self._draw(method, part, judge, lambda n: bar.update(task, advance=n))
                self._write(path, drawn | {"prompts": np.array(part.digest)})
            else:
                bar.update(task, advance=len(part))
            with np.load(path) as file:
                parts.append({name: file[name] for name in file.files})
        bar.remove_task(task)
        alone = ("seconds", "prompts")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name not in alone}
        joined["features"] = joined["features"].astype(np.float64)
        return Measured(**joined, seconds=float(sum(part["seconds"] for part in parts)))

    @staticmethod
    def _draw(method: Method, prompts: Prompts, judge: Judge, advance) -> Shards:
        found: dict[str, list[np.ndarray]] = {"features": [], "marks": [], "sharpness": [], "latents": []}
        seconds = 0.0
        for part in _batches(prompts):
            started = time.perf_counter()
            pictures, latents = method.draw(part)
            seconds += time.perf_counter() - started
            features, scenes = judge.read(pictures)
            found["features"].append(features.astype(np.float32))
            found["marks"].append(marks(part, scenes))
            found["sharpness"].append(sharpness(pictures).astype(np.float32))
            empty = np.zeros((len(part), 0), np.float16)
            found["latents"].append(empty if latents is None else latents.cpu().numpy().astype(np.float16))
            advance(len(part))
        return {**{name: np.concatenate(values) for name, values in found.items()}, "seconds": np.float64(seconds)}  # type: ignore[dict-item]

    @staticmethod
    def _write(path: Path, shard: Shards) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **shard)  # type: ignore[arg-type]


def _is_of(path: Path, prompts: Prompts) -> bool:
    """Whether the shard is there and its pictures are of these prompts; those of another version of the code may not be."""
    if not path.exists():
        return False
    with np.load(path) as file:
        return str(file.get("prompts", "")) == prompts.digest


def _batches(prompts: Prompts) -> Iterator[Prompts]:
    for first in range(0, len(prompts), BATCH):
        yield prompts[slice(first, first + BATCH)]


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
