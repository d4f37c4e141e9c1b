"""`imagine-flash train-teacher`, `distill`, `train-judge` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ImagineFlashError
from .common import Device, Font, Output, Quiet, flag, note, progress, say, training, writable

if TYPE_CHECKING:
    from ..distill.recipe import DistillRecipe

Recipe = Annotated[str, typer.Option(metavar="NAME", help="A built-in recipe or a YAML file.")]
EmbeddedTeacher = Annotated[
    Path | None,
    typer.Argument(metavar="TEACHER", help="A diffusers folder; by default the embedded one (checkout only)."),
]
EmbeddedJudge = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A judge that train-judge wrote; by default the embedded one (checkout only)."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Also log to tensorboard, wandb, mlflow, aim or another tracker of accelerate; may be repeated.",
    ),
]
MOST_GUIDANCE = 50
EMOJI = Path(__file__).resolve().parents[1] / "assets" / "emoji"


def train_teacher_command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The diffusers folder to write; the run is kept in OUT.run.")
    ],
    recipe: Recipe = "teacher",
    start: Annotated[
        Path | None,
        typer.Option(metavar="TEACHER", help="Begin with this teacher's weights, and keep its autoencoder."),
    ] = None,
    device: Device = None,
    track: Track = None,
    font: Font = None,
    quiet: Quiet = False,
) -> None:
    """Train a text-to-image teacher on emoji scenes, into a diffusers folder."""
    training()
    writable(out, make=True)
    from ..distill.devices import use_device
    from ..distill.recipe import TeacherRecipe, load_recipe
    from ..distill.teacher import train_teacher

    settings = load_recipe(recipe, TeacherRecipe)
    use_device(device)
    train_teacher(settings, out, start=start, font=font, console=progress(), track=track or ())
    say(str(out))


def distill_command(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="A diffusers pipeline folder.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The student folder to write; the run is kept in OUT.run.")
    ],
    recipe: Recipe = "imagine_flash",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to train on, one a line; general: 2,000 that are built in; by default captions of emoji scenes.",
        ),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|TARS|HUBID",
            help="Pictures with captions, for a recipe that needs them: a folder, WebDataset tars (a folder or pattern), a set "
            "of Hugging Face's datasets.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="PICTURE,CAPTION", help="What a set calls them; by default image and text, caption or prompt."
        ),
    ] = None,
    buckets: Annotated[
        bool, flag("--buckets", help="Each picture keeps about its shape, instead of being cropped to the teacher's.")
    ] = False,
    start: Annotated[
        Path | None, typer.Option(metavar="STUDENT", help="Begin with this student's weights instead of the teacher's.")
    ] = None,
    start_teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="TEACHER",
            help="The teacher that --start is a student of, earlier in its training: adds what TEACHER learned since.",
        ),
    ] = None,
    plan_memory: Annotated[
        bool,
        flag(
            "--plan-memory",
            help="Say what the run would take of a GPU's memory (with --device cpu: of a CPU's), and train nothing.",
        ),
    ] = False,
    shard: Annotated[
        bool,
        flag(
            "--shard",
            help="Share student and teacher out over the processes that were launched, for less memory in each.",
        ),
    ] = False,
    device: Device = None,
    track: Track = None,
    font: Font = None,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a student of 1, 2 and 3 steps."""
    training()
    if not plan_memory:
        writable(out, make=True)
    from ..distill.data.captioned import picture_source
    from ..distill.data.prompts import read_prompts
    from ..distill.devices import use_device
    from ..distill.methods import load_distill_recipe
    from ..distill.student import check_run, distill

    settings, texts = load_distill_recipe(recipe), read_prompts(prompts) if prompts else None
    source = picture_source(pictures, columns, buckets)
    use_device(device)
    how: Any = {"start": start, "start_teacher": start_teacher, "font": font, "track": track or ()}
    if plan_memory:
        check_run(settings, texts, source, **how)
        return _say_memory(teacher, settings, shared=shard, device="cpu" if device == "cpu" else "cuda")
    how |= {"console": progress(), "shared": shard}
    distill(teacher, out, settings, prompts=texts, pictures=source, **how)
    say(str(out))
    note(f"next: imagine-flash export {out} ARTIFACT")


def _say_memory(teacher: Path, recipe: DistillRecipe, *, shared: bool, device: str) -> None:
    """The parts of a run's memory on a device of that kind, one a line, and their sum."""
    from ..distill.devices import use_device
    from ..distill.memory import plan_memory as planned

    use_device("cpu")
    plan = planned(teacher, recipe, device=device)
    lines = {
        "weights that do not train": plan.frozen,
        "weights that train, and their average": plan.trained,
        "moments of the optimiser": plan.moments,
        "activations, gradients and targets": plan.update,
        "in all, of one process without --shard" if shared else "in all": plan.total,
    }
    for name, count in lines.items():
        say(f"{count / 2**30:8.2f} GiB  {name}")
    note(
        "beside what torch itself takes. Less: lora, teacher_dtype, gradient_checkpointing, accumulate, adamw8bit in the recipe"
    )


def train_judge_command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write (safetensors); the run is kept in OUT.run.")
    ],
    recipe: Recipe = "judge",
    device: Device = None,
    font: Font = None,
    quiet: Quiet = False,
) -> None:
    """Train the classifier that measures prompt fidelity and FD (judge)."""
    training()
    writable(out, make=True)
    if out.is_dir():
        raise ImagineFlashError(f"cannot write {out}: it is a folder; name a file such as {out / 'judge.safetensors'}")
    from ..benchmarks.quality.judge import JudgeRecipe, train_judge
    from ..distill.devices import use_device
    from ..distill.recipe import load_recipe

    settings = load_recipe(recipe, JudgeRecipe)
    use_device(device)
    figures = train_judge(settings, out, font=font, console=progress())
    note(f"right on {figures['accuracy']['seen']['all']:.2%} of unseen scenes")
    say(str(out))


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

    Pictures are kept in OUTPUT.run: the same command goes on where a stopped one was.
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
        done = train_variant(study, train, teacher, output, font=font)
        say(f"trained {train}: {done.training.get('steps', 0):.0f} updates")
        return
    record = run_study(study, teacher, judge or _embedded("judge.safetensors"), output, font=font, device=used)
    say(quality_as_markdown(record))


def _embedded(name: str) -> Path:
    """What lies beside the embedded artifact in a checkout and, for its size, in no wheel."""
    path = EMOJI / name
    if not path.exists():
        raise ImagineFlashError(
            f"the embedded {path.stem} is not in the wheel, which holds what draws and no more; name one of yours "
            "(see --help), or run in a checkout of the repository"
        )
    return path
