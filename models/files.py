"""The files of a diffusers folder: which of them its networks need, which are missing, and how much they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from math import prod
from pathlib import Path
from typing import Any

from ..core.errors import ArtifactError
from ..core.schedule import NoiseSchedule
from ..folders.files import ARTIFACT_FILE, STUDENT_FILE
from ..folders.hub import PICKLED
from ..folders.manifests import PIPELINE_FILE, SCHEDULER_FILE
from ..folders.reading import read_config

UNDRAWN = ("safety_checker", "feature_extractor", "image_encoder")  # components that no picture needs
NETWORKS = ("unet", "transformer")  # names of the denoiser
TOKENIZERS = (
    "tokenizer.json",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)  # one of them is a tokenizer's own file
WEIGHTS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}  # how each library calls them
PIECE = re.compile(r"-\d+-of-\d+\.")  # in the name of a file that an index lists
PIPELINE_FILES = ("*.json", "*/*.safetensors", "*/*.txt", "*/*.model")  # not whole checkpoints at the top
TOLD = (PIPELINE_FILE, STUDENT_FILE)  # small files of a repository that say what it is
HEADER = 8  # bytes of a safetensors file that say how long its header is


def missing_files(folder: Path, *, without: Collection[str] = ()) -> list[str]:
    """Relative paths of what the pipeline's components need and the folder lacks; of weights by the name of a single file.

    without: components whose weights come from elsewhere. Raises ArtifactError.
    """
    if not (folder / PIPELINE_FILE).is_file():
        return [PIPELINE_FILE]
    found: list[str] = []
    for part, kind in read_config(folder / PIPELINE_FILE).items():
        if part.startswith("_") or part in UNDRAWN or not isinstance(kind, list) or None in kind:
            continue
        found += [f"{part}/{name}" for name in _missing(folder / part, str(kind[0]), str(kind[1]), part in without)]
    return found


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's components."""
    return sorted({path.resolve() for path in folder.rglob("*.safetensors") if path.parent.name not in UNDRAWN})


def count_parameters(files: Collection[Path]) -> int:
    """Numbers in the tensors of safetensors files, by their headers. ValueError, OSError for a file that is none."""
    total = 0
    for path in files:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(HEADER), "little")))
        total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


def _missing(part: Path, library: str, kind: str, only_config: bool) -> Iterator[str]:
    if kind.endswith("Scheduler"):
        yield from () if (part / "scheduler_config.json").is_file() else ("scheduler_config.json",)
    elif "Tokenizer" in kind:
        there = [name for name in TOKENIZERS if (part / name).is_file()]
        if not there:
            yield TOKENIZERS[0]
        elif there == ["vocab.json"] and not (part / "merges.txt").is_file():
            yield "merges.txt"
    else:
        yield from () if (part / "config.json").is_file() else ("config.json",)
        yield from () if only_config else _missing_weights(part, WEIGHTS.get(library, "model"))


def _missing_weights(part: Path, stem: str) -> Iterator[str]:
    """Nothing where one index has all its pieces or a single file lies there, else the pieces of the first index."""
    indices = [missing_pieces(index) for index in sorted(part.glob("*.safetensors.index*.json"))]
    files = [path.name for path in part.glob("*.safetensors") if path.is_file()]
    single = any(name.startswith(stem) and not PIECE.search(name) for name in files) if indices else bool(files)
    if not single and all(indices):
        yield from indices[0] if indices else (f"{stem}.safetensors",)


def pieces_of(index: Path) -> list[Path]:
    """The files that an index of weights lists. Raises ArtifactError."""
    return [
        index.parent / name for name in sorted({str(one) for one in read_config(index).get("weight_map", {}).values()})
    ]


def missing_pieces(index: Path) -> list[str]:
    """Names of those that are not there."""
    return [path.name for path in pieces_of(index) if not path.is_file()]


def read_pipeline(folder: Path, without: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """The class and the scheduler's config of a diffusers folder that is whole. Raises ArtifactError, ScheduleError."""
    if not (folder / PIPELINE_FILE).is_file():
        raise ArtifactError(_no_pipeline(folder))
    if missing := missing_files(folder, without=without):
        raise ArtifactError(_not_whole(folder, missing))
    index, scheduler = read_config(folder / PIPELINE_FILE), read_config(folder / SCHEDULER_FILE)
    if not scheduler.get("_class_name"):
        scheduler["_class_name"] = _scheduler_class(folder, index)
    NoiseSchedule.from_scheduler_config(scheduler)
    return str(index.get("_class_name")), scheduler


def pipeline_files(told: Path) -> tuple[str, ...] | None:
    """Patterns of what a pipeline of others is loaded from; None, for all files, where it is a student of ours or none.

    told: a folder with those of the files TOLD that there are.
    """
    return PIPELINE_FILES if (told / PIPELINE_FILE).is_file() and not (told / STUDENT_FILE).is_file() else None


def _scheduler_class(folder: Path, index: dict[str, Any]) -> str:
    """What the pipeline's index says, which is what diffusers goes by."""
    kind = index.get("scheduler")
    if isinstance(kind, list) and len(kind) == 2 and isinstance(kind[1], str):
        return kind[1]
    raise ArtifactError(f'{folder / SCHEDULER_FILE} has no _class_name; add it, such as "_class_name": "DDIMScheduler"')


def _not_whole(folder: Path, missing: list[str]) -> str:
    """What is missing, and where it may be put."""
    first = folder / missing[0]
    if any(path.is_file() for pattern in PICKLED for path in first.parent.glob(pattern)):
        return (
            f"{first.parent} holds its weights as a pickle alone, which is not read; where you trust it, convert it: load the "
            "pipeline in diffusers and save_pretrained() it"
        )
    listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    return (
        f"{folder} is not whole: it has no {listed}; a repository of the hub is fetched again with network, without "
        "put the files there; weights that are pickles alone are never fetched"
    )


def _no_pipeline(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist; check the path, or see the names that are known: imagine-flash models"
    if not folder.is_dir():
        return f"{folder} is a file, not a folder; for single weights add --as and a catalogue's name"
    if (folder / ARTIFACT_FILE).is_file():
        return f"{folder} is an exported artifact, not a student; give the folder that it was exported from"
    return f"{folder} is no diffusers pipeline: {PIPELINE_FILE} is missing"
