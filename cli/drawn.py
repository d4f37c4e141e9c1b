"""What `imagine-flash generate` writes and says of the pictures that it drew: one prompt's, or a folder of many prompts'."""

from __future__ import annotations

import json
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ImagineFlashError
from .common import progress_bar, say

if TYPE_CHECKING:
    from ..engine import Engine, GenerateRequest, GenerateResult
    from ..folders.manifests import ModelDescription

METADATA = "metadata.jsonl"  # of a folder of pictures with captions, as Hugging Face datasets reads it
WORDS = 10  # that are named
WAITING = 4  # network calls' worth of pictures that wait, so that the batches are full


def hand_out(result: GenerateResult, output: Path, *, as_json: bool) -> None:
    """Writes the pictures, and says where. Raises ImagineFlashError."""
    from ..engine.saving import png_bytes

    if str(output) == "-":
        sys.stdout.buffer.write(png_bytes(result.images[0], result.caption()))
        sys.stdout.buffer.flush()
        return
    paths = result.save(output)
    if as_json:
        say(json.dumps(_facts(result, paths)))
        return
    for i, path in enumerate(paths):
        say(f"{path} ({result.steps} steps, seed {result.seed + i})")


def _facts(result: GenerateResult, paths: list[Path]) -> dict[str, Any]:
    return {
        "files": [str(path) for path in paths],
        "steps": result.steps,
        "seed": result.seed,
        "lora": dict(result.loras),
        "timings": result.timings.stages(),
        "unknown_words": result.unknown_words,
        "replaced_words": result.replaced_words,
        "cut": result.cut,
        "cut_negative": result.cut_negative,
    }


@dataclass
class Drawn:
    """How many prompts of a folder were drawn, and what the model made of them: words that it does not know, typos and what was
    read instead, how many prompts were longer than it reads, and the end of a negative one that was, which all of them share."""

    new: int = 0
    unknown: dict[str, None] = field(default_factory=dict)  # in their order
    replaced: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    cut_negative: str = ""

    def add(self, result: GenerateResult) -> None:
        self.new += 1
        self.unknown |= dict.fromkeys(result.unknown_words)
        self.replaced |= result.replaced_words
        self.cut += bool(result.cut)
        self.cut_negative = result.cut_negative

    def notes(self) -> list[str]:
        """A line each."""
        found, kept = [], f"{METADATA} has the text as given"
        if self.replaced:
            found.append(f"note: read {_some(f'{a!r} as {b!r}' for a, b in self.replaced.items())}; {kept}")
        if self.unknown:
            found.append(f"note: this model has no word for {_some(self.unknown)}; drawn without")
        if self.cut:
            found.append(f"note: {self.cut} of the prompts are longer than this model reads, and were cut; {kept}")
        return found + _cut_notes("negative prompt", self.cut_negative)


def _some(words: Iterable[str]) -> str:
    named = [*words]
    more = f" and {len(named) - WORDS} others" if len(named) > WORDS else ""
    return ", ".join(named[:WORDS]) + more


def draw_many(engine: Engine, prompts: Sequence[str], folder: Path, values: dict[str, Any]) -> Drawn:
    """Draws prompt i with seed + i into `folder`/0001.png and on, with a line of METADATA for each; what the folder holds of them
    already is left. Returns what became of the others. Raises ImagineFlashError for a folder that holds others."""
    from ..engine import GenerateRequest

    seeds = range(values["seed"], values["seed"] + len(prompts))
    requests = [
        GenerateRequest(**{**values, "prompt": text, "seed": seed}) for text, seed in zip(prompts, seeds, strict=True)
    ]
    rows = _rows(engine, requests)
    folder.mkdir(exist_ok=True)
    done = _drawn_before(folder, rows)
    asked, waiting = iter(zip(rows[done:], requests[done:], strict=True)), deque[tuple[dict[str, Any], Any]]()
    drawn = Drawn()
    with progress_bar() as tell, (folder / METADATA).open("a", encoding="utf-8") as lines:
        tell("drawing", len(rows) - done)
        while True:
            while len(waiting) < WAITING * engine.max_batch and (one := next(asked, None)):
                waiting.append((one[0], engine.submit(one[1])))
            if not waiting:
                return drawn
            row, drawing = waiting.popleft()
            result: GenerateResult = drawing.result()
            result.save(folder / row["file_name"])
            drawn.add(result)
            lines.write(_line(row))
            lines.flush()
            tell("drawing", len(rows) - done)


def _rows(engine: Engine, requests: Sequence[GenerateRequest]) -> list[dict[str, Any]]:
    """What the metadata says of each picture. Raises PlanError, RequestError."""
    digits, guidance = max(4, len(str(len(requests)))), engine.manifest.guidance.default
    rows = []
    for i, request in enumerate(requests, 1):
        steps, (height, width) = engine.check(request)
        rows.append(
            {
                "file_name": f"{i:0{digits}}.png",
                "text": request.prompt,
                "negative_prompt": request.negative_prompt or "",
                "seed": request.seed,
                "steps": steps,
                "guidance": guidance if request.guidance is None else request.guidance,
                "width": width,
                "height": height,
                "lora": dict(request.lora or {}),
                "model": engine.manifest.name,
            }
        )
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _drawn_before(folder: Path, rows: Sequence[dict[str, Any]]) -> int:
    """How many of the first rows the folder holds; its metadata then says no more. Raises ImagineFlashError where it holds anything
    else."""
    from ..folders.files import atomic_file

    metadata = folder / METADATA
    if not metadata.exists():
        if any(folder.iterdir()):
            raise ImagineFlashError(f"{folder} holds other files and no {METADATA}; name a new folder")
        return 0
    found = metadata.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    )  # a prompt may hold what `splitlines` splits at
    whole = [f"{line}\n" for line in found[:-1]]  # the last one may have been cut short
    for i, line in enumerate(whole):
        if i >= len(rows) or line != _line(rows[i]):
            raise ImagineFlashError(
                f"{metadata}, line {i + 1}, is of another prompt, seed, plan, size, LoRA or model; "
                "name a new folder, or go on as it began"
            )
    done = next((i for i in range(len(whole)) if not (folder / rows[i]["file_name"]).is_file()), len(whole))
    with atomic_file(metadata) as temporary:
        temporary.write_text("".join(whole[:done]), encoding="utf-8")
    return done


def notes(result: GenerateResult, nearest: Callable[[str], list[str]], model: Path | None) -> list[str]:
    """What the model made of words that it does not know, a line each. nearest: the known words that are spelled like one;
    model: its folder, None of the embedded one."""
    found = [f"note: read {typed!r} as {known!r}" for typed, known in result.replaced_words.items()]
    if result.unknown_words:
        words = [
            f"{word} (near: {', '.join(near)})" if (near := nearest(word)) else word for word in result.unknown_words
        ]
        inspect = shlex.join(["imagine-flash", "inspect", *([] if model is None else [str(model)])])
        found.append(f"note: this model has no word for {', '.join(words)}; drawn without; what it knows: {inspect}")
    return found + _cut_notes("prompt", result.cut) + _cut_notes("negative prompt", result.cut_negative)


def _cut_notes(name: str, cut: str) -> list[str]:
    return [f"note: the {name} is longer than this model reads; left out: {cut[:200]!r}"] if cut else []


def guidance_notes(model: ModelDescription, asked: float | None) -> list[str]:
    """A line where the scale asked for is none that the model was made for."""
    known = model.guidance
    low, high = known.range or (0.0, float("inf") if known.embedded or known.default > 1 else 1.0)
    if asked is None or low <= asked <= high or max(asked, high) <= 1:  # 0 and 1 are none, both
        return []
    made = f"{low:g} to {high:g}" if high > max(low, 1) else "1, which is none"
    return [f"note: {model.name} was made for guidance {made}; drawn with {asked:g}"]
