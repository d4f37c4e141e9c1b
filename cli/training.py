"""`imagine-flash train-teacher`, `distill`, `train-judge` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ImagineFlashError
from .common import Quiet, note, say, training, writable

EMOJI = Path(__file__).resolve().parents[1] / "assets" / "emoji"


def train_teacher_command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The pipeline folder to write; its state is kept in OUT.run.")
    ],
    recipe: Annotated[str, typer.Option(help="A built-in recipe's name or a YAML file.")] = "teacher",
    start: Annotated[
        Path | None, typer.Option(metavar="TEACHER", help="Keep this teacher's autoencoder and begin with its weights.")
    ] = None,
    font: Annotated[Path | None, typer.Option(help="The Noto Color Emoji font, if it is in no usual place.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train a text-to-image teacher on emoji scenes, into a diffusers folder."""
    writable(out, make=True)
    training()
    from ..distill.recipe import TeacherRecipe, load_recipe
    from ..distill.teacher import train_teacher

    settings = load_recipe(recipe, TeacherRecipe)
    train_teacher(settings, out, start=start, font=font)
    say(str(out))


def distill_command(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="A diffusers pipeline folder.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The student folder to write; its state is kept in OUT.run.")
    ],
    recipe: Annotated[str, typer.Option(help="A built-in recipe's name or a YAML file.")] = "imagine_flash",
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; else captions of emoji scenes.")] = None,
    start: Annotated[
        Path | None, typer.Option(metavar="STUDENT", help="Begin with this student's weights, not the teacher's.")
    ] = None,
    font: Annotated[Path | None, typer.Option(help="The Noto Color Emoji font, if it is in no usual place.")] = None,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a student of 1, 2 and 3 steps."""
    writable(out, make=True)
    training()
    from ..distill.data.prompts import read_prompts
    from ..distill.recipe import DistillRecipe, load_recipe
    from ..distill.student import distill

    settings = load_recipe(recipe, DistillRecipe)
    distill(teacher, out, settings, prompts=read_prompts(prompts) if prompts else None, start=start, font=font)
    say(str(out))
    note(f"next: imagine-flash export {out} ARTIFACT")


def train_judge_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (safetensors).")],
    font: Annotated[Path | None, typer.Option(help="The Noto Color Emoji font, if it is in no usual place.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train the classifier that measures prompt fidelity and FD (judge)."""
    writable(out, make=True)
    if out.is_dir():
        raise ImagineFlashError(f"cannot write {out}: it is a folder; name a file such as {out / 'judge.safetensors'}")
    training()
    from ..benchmarks.quality.judge import train_judge

    figures = train_judge(out, font=font)
    note(f"right on {figures['accuracy']['seen']['all']:.2%} of unseen scenes")
    say(str(out))


def evaluate_command(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="The teacher's pipeline folder.")] = EMOJI
    / "teacher",
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The student's folder.")] = EMOJI / "student",
    judge: Annotated[Path, typer.Option(help="What train-judge wrote.")] = EMOJI / "judge.safetensors",
    output: Annotated[Path, typer.Option("--output", "-o", help="Writes OUTPUT.json and OUTPUT.png.")] = Path(
        "evaluation"
    ),
    split: Annotated[
        str, typer.Option(help="Prompts for making choices (validation) or for the last word (test).")
    ] = "test",
    count: Annotated[int, typer.Option(help="Seen prompts, at least 258.")] = 10_000,
    held_out: Annotated[int, typer.Option(help="Prompts of held-out combinations.")] = 1024,
    guidance: Annotated[float | None, typer.Option(help="The teacher's guidance; else the student's recipe's.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only this row, as the table names it (repeatable).")] = None,
    teacher_only: Annotated[bool, typer.Option("--teacher-only", help="Measure the teacher alone.")] = False,
    font: Annotated[Path | None, typer.Option(help="The Noto Color Emoji font, if it is in no usual place.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure prompt fidelity and FD (judge); by default of the embedded teacher and student, in a checkout.

    Pictures are kept in OUTPUT.run: the same command goes on where a stopped one was.
    """
    writable(output)
    training()
    for folder in (teacher, *([] if teacher_only else [student])):
        if folder.is_relative_to(EMOJI) and not folder.is_dir():
            raise ImagineFlashError(
                "the embedded teacher and student are in a checkout alone; give TEACHER and STUDENT"
            )
    from ..benchmarks.quality.evaluate import evaluate

    evaluate(
        teacher,
        None if teacher_only else student,
        judge,
        output,
        split=split,
        count=count,
        held_out=held_out,
        guidance=guidance,
        only=row,
        font=font,
    )
    say(f"{output}.json\n{output}.png")
