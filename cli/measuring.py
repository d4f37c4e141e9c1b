"""`imagine-flash evaluate`, `study` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ImagineFlashError
from .common import Device, Font, Output, Quiet, Recipe, flag, note, progress, say, training, writable

EmbeddedTeacher = Annotated[
    Path | None,
    typer.Argument(metavar="TEACHER", help="A diffusers folder; by default the embedded one (checkout only)."),
]
EmbeddedJudge = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A judge that train-judge wrote; by default the embedded one (checkout only)."),
]
MOST_GUIDANCE = 50
EMOJI = Path(__file__).resolve().parents[1] / "assets" / "emoji"


def evaluate_command(
    teacher: EmbeddedTeacher = None,
    student: Annotated[
        Path | None,
        typer.Argument(metavar="STUDENT", help="A student folder; by default the embedded one (checkout only)."),
    ] = None,
    judge: EmbeddedJudge = None,
    output: Output = Path("evaluation"),
    recipe: Recipe = "evaluation",
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="validation: prompts to make choices on; test: prompts to report; by default the recipe's.",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            help="Prompts of combinations seen in training, at least 258; by default the recipe's, 10,000.",
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            help="Prompts of combinations held out from training, at least 1; by default the recipe's, 1,024.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="The teacher's guidance; by default that of the student's recipe."),
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this row of the table, by its name; may be repeated.")
    ] = None,
    teacher_only: Annotated[bool, flag("--teacher-only", help="Measure the teacher alone.")] = False,
    device: Device = None,
    font: Font = None,
    quiet: Quiet = False,
) -> None:
    """Measure prompt fidelity and FD (judge); by default of the embedded teacher and student, in a checkout.

    Pictures are kept in OUTPUT.run: the same command goes on where a stopped one was, and one of another student of the same
    teacher draws the student's alone.
    """
    training()
    writable(output)
    if guidance is not None and not 0 < guidance <= MOST_GUIDANCE:
        raise ImagineFlashError(f"--guidance must be a number above 0, at most {MOST_GUIDANCE}, got {guidance:g}")
    teacher, student = teacher or _embedded("teacher"), None if teacher_only else student or _embedded("student")
    from rich.console import Console

    from ..benchmarks.quality.evaluate import EvaluationRecipe, evaluate
    from ..benchmarks.quality.tables import as_rich
    from ..distill.devices import use_device
    from ..distill.recipe import load_recipe

    settings = load_recipe(recipe, EvaluationRecipe)
    record = evaluate(
        teacher,
        student,
        judge or _embedded("judge.safetensors"),
        output,
        split=split or settings.split,
        count=settings.count if count is None else count,
        held_out=settings.held_out if held_out is None else held_out,
        guidance=settings.guidance if guidance is None else guidance,
        only=row or list(settings.rows),
        font=font,
        device=use_device(device),
        console=progress(),
    )
    Console().print(as_rich(record))
    say(f"{output}.json\n{output}.png")


def study_command(
    study: Annotated[
        Path,
        typer.Argument(metavar="STUDY", help="A YAML file: recipes that differ in a few fields (benchmarks/studies)."),
    ],
    teacher: EmbeddedTeacher = None,
    judge: EmbeddedJudge = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="NAME", help="Write NAME.json (the record).")
    ] = Path("study"),
    train: Annotated[
        str | None,
        typer.Option(
            metavar="VARIANT",
            help="Train this one and measure nothing: several commands may train at once, and the study without this "
            "option goes on with what they made.",
        ),
    ] = None,
    device: Device = None,
    font: Font = None,
    quiet: Quiet = False,
) -> None:
    """Distil and measure every variant of a study, on the same prompts and noises.

    Students and pictures are kept in OUTPUT.run: the same command goes on with what is not there yet.
    """
    training()
    if not study.is_file():
        raise ImagineFlashError(f"no study at {study}; give a YAML file such as those in benchmarks/studies")
    writable(output, make=True)
    from ..benchmarks.quality.study import run_study, train_variant
    from ..benchmarks.quality.tables import quality_as_markdown
    from ..distill.devices import use_device

    teacher, used = teacher or _embedded("teacher"), use_device(device)
    if train is not None:
        done = train_variant(study, train, teacher, output, font=font, console=progress())
        say(f"trained {train}: {done.training.get('steps', 0):.0f} updates")
        return
    judge = judge or _embedded("judge.safetensors")
    say(quality_as_markdown(run_study(study, teacher, judge, output, font=font, device=used, console=progress())))


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


def _embedded(name: str) -> Path:
    """What lies beside the embedded artifact in a checkout and, for its size, in no wheel."""
    path = EMOJI / name
    if not path.exists():
        raise ImagineFlashError(
            f"the embedded {path.stem} is not in the wheel, which holds what draws and no more; name one of yours "
            "(see --help), or run in a checkout of the repository"
        )
    return path
