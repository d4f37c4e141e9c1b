"""`imagine-flash compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ImagineFlashError
from .common import Device, Quiet, note, say, training, writable


def compare_command(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", help="A folder of pictures, captions in metadata.jsonl.")
    ],
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT", help="Pictures of the same prompts, by the same names.")
    ],
    features: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="A vision model of transformers: a folder or hub id of CLIP, SigLIP, DINOv2."
        ),
    ] = "openai/clip-vit-large-patch14",
    real: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Real pictures, to which both are compared.")
    ] = None,
    categories: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Lists of prompts, CATEGORY.txt with one a line, such as T2I-CompBench's: scores of each category too.",
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Instead of the CLIP score: your function of pictures (PIL) and captions that gives a number for each.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="NAME", help="Write NAME.json (the record).")
    ] = Path("comparison"),
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure a student's pictures against its teacher's: FD, KD, precision, recall, CLIP score; for any model."""
    training()
    writable(output)
    from ..benchmarks.picture_folders import picture_files

    for folder in filter(None, (teacher, student, real)):  # what is wrong is said before seconds and minutes of loading
        if not picture_files(folder):
            raise ImagineFlashError(f"{folder} is no folder of pictures (.png, .jpg, .webp)")
    from ..benchmarks.quality.features import Features
    from ..benchmarks.quality.folders import as_lines, compare_folders, pairs_of
    from ..benchmarks.quality.scorers import load_scorer, read_categories
    from ..distill.devices import use_device

    pairs_of(teacher, student)
    lists = None if categories is None else read_categories(categories)
    if scorer is not None:
        load_scorer(scorer)
    model = Features(features, use_device(device))
    record = compare_folders(teacher, student, model, real=real, scorer=scorer, categories=lists, out=output)
    for line in as_lines(record):
        say(line)
    note(f"{output}.json")
