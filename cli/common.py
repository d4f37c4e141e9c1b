"""What the commands share: early refusals, and how they speak: results on standard output, everything else on standard error."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ImagineFlashError, missing_extra

if TYPE_CHECKING:
    from ..models.options import ModelOptions

_quiet = False


def set_quiet(value: bool) -> bool:
    global _quiet
    _quiet = value
    return value


def flag(*names: str, help: str, **more: Any) -> Any:
    """An option without a value: its help shows no type."""
    return typer.Option(*names, help=help, metavar="", **more)


def show_help(context: typer.Context) -> None:
    """The callback of commands that have commands: alone, they show their help as the whole program does."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Quiet = Annotated[
    bool, flag("--quiet", "-q", help="Say nothing but results and errors.", callback=set_quiet, is_eager=True)
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="NAME", help="Write NAME.json (the record) and NAME.png (the pictures)."),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N; by default a GPU where there is one.")
]
Recipe = Annotated[str, typer.Option(metavar="NAME", help="A built-in recipe or a YAML file.")]
Font = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The font Noto Color Emoji; by default where the system keeps its fonts."),
]


Entry = Annotated[
    str | None,
    typer.Option("--as", metavar="NAME", help="Read the folder as this model of the catalogue: imagine-flash models."),
]
Timesteps = Annotated[
    str | None, typer.Option(metavar="999,749,499,249", help="The plan of a model that does not say its own.")
]
SamplerName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="deterministic, renoise, ancestral or strategic, instead of the scheduler's."),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What the network predicts: epsilon, v_prediction, sample; by default its config."
    ),
]
AnySteps = Annotated[bool, flag("--any-steps", help="Also numbers of steps that the model was not trained for.")]


Base = Annotated[
    str | None,
    typer.Option(
        metavar="HUBID|FOLDER", help="Whose configs a single .safetensors file of a whole pipeline is read with."
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="[NAME=]PATH[:WEIGHT]",
        help="A LoRA to draw with, of diffusers, peft or kohya's format: a file, folder or hub id; may be repeated.",
    ),
]
TinyDecoder = Annotated[
    str | None,
    typer.Option(
        metavar="HUBID|FOLDER|none", help="An AutoencoderTiny to decode with instead of the model's own decoder."
    ),
]

ControlNet = Annotated[
    str | None,
    typer.Option(
        "--controlnet",
        metavar="HUBID|FOLDER",
        help="A ControlNet or T2I-adapter for this model, which reads a conditioning picture: edges, depth, a pose.",
    ),
]


def model_options(
    entry: str | None,
    timesteps: str | None,
    sampler: str | None,
    prediction: str | None,
    any_steps: bool,
    tiny_decoder: str | None,
    **more: Any,
) -> ModelOptions:
    """What was typed of a model. Raises ArtifactError."""
    from ..models.options import ModelOptions, parse_timesteps

    how: Any = sampler  # the name is checked there
    return ModelOptions(
        entry=entry,
        timesteps=parse_timesteps(timesteps),
        sampler=how,
        prediction=prediction,
        any_steps=any_steps,
        tiny_decoder=tiny_decoder,
        **more,
    )


def say(line: str) -> None:
    """A result, on standard output: what a script reads."""
    typer.echo(line)


def note(line: str) -> None:
    """How it goes, on standard error; --quiet leaves it out."""
    if not _quiet:
        typer.echo(line, err=True)


def progress() -> Any:
    """The console of progress bars, on standard error; --quiet silences it."""
    from rich.console import Console

    return Console(stderr=True, quiet=_quiet)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int], None]]:
    """A progress bar on a terminal's standard error: call it with what is being done and how many such things there are in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = progress()
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        started = False

        def tell(what: str, total: int) -> None:
            nonlocal started
            bar.update(task, description=what, total=total or None, advance=int(started))
            started = True

        yield tell


def examples(*lines: str) -> str:
    """What stands below a command's options in its help."""
    return "\n\n".join(["**Examples**", *(f"    $ imagine-flash {line}" for line in lines)])


def needs(extra: str, *packages: str) -> None:
    """One line that says what to install where a package is missing; and less noise from those that are there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which others import: it tells of 4-bit kernels


def training() -> None:
    needs("train", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "PIL", "yaml")


def writable(path: Path, *, make: bool = False) -> None:
    """Refuse early, before minutes of work, what could not be written at the end. make: the parent folder, where it is missing."""
    parent = path.parent
    if make and not parent.exists():
        try:
            parent.mkdir(parents=True)
        except OSError as error:
            raise ImagineFlashError(
                f"cannot make the folder {parent}: {(error.strerror or str(error)).lower()}"
            ) from None
    if not parent.is_dir():
        raise ImagineFlashError(f"cannot write {path}: {parent} is not a folder; make it first")
    if not os.access(parent, os.W_OK):
        raise ImagineFlashError(f"cannot write {path}: {parent} is read-only; choose another place")
    if path.suffix and path.is_dir():
        raise ImagineFlashError(f"cannot write {path}: it is a folder")


def say_sources(student: Path) -> None:
    """A line that says which decoder draws, and one for each place that something of a foreign model was taken from."""
    from ..folders.files import STUDENT_FILE
    from ..folders.reading import read_student_manifest

    if not (student / STUDENT_FILE).is_file():
        return
    manifest = read_student_manifest(student)
    if "decoder" in manifest.sources:
        note(f"{student.name}: decodes with {manifest.sources['decoder']}")
    for source in dict.fromkeys(manifest.sources.values()):
        fields = [field for field, other in manifest.sources.items() if other == source and field != "decoder"]
        if fields:
            note(f"{student.name}: {', '.join(fields)} from {source}")
