"""`imagine-flash train-teacher`, `distill` and `train-judge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ImagineFlashError
from .common import Device, Font, Quiet, Recipe, flag, note, progress, say, training, writable

if TYPE_CHECKING:
    from ..distill.recipe import DistillRecipe

Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Also log to tensorboard, wandb, mlflow, aim or another tracker of accelerate; may be repeated.",
    ),
]


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
