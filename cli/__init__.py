"""The command `imagine-flash`: one thin function per verb. What a verb needs is imported inside it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer

from ..core.errors import ImagineFlashError, Interrupted, ParityError
from .arena import arena_command
from .bench import bench
from .cache import cache
from .common import examples, flag, set_quiet, show_help
from .exporting import build_tensorrt_command, export_command
from .generate import generate_command
from .inspecting import inspect_command
from .measuring import compare_command, evaluate_command, study_command
from .models import models_command
from .pushing import push_command
from .serve import serve_command
from .training import distill_command, train_judge_command, train_teacher_command

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="Distil a diffusion model into a 1-3 step student, export it, and draw with it.\n\n"
    "Results go to standard output, everything else to standard error. Exit code 2: something in the command or its files "
    "is wrong, and one line says what; 3: an exported graph differs from torch; 130: interrupted.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    generate_command: (
        'generate "a fox on a pink background" -o fox.png',
        'generate "two cats" --seed 7 -o - > cats.png',
    ),
    serve_command: ("serve --port 8000", "serve --host 0.0.0.0 --api-key-file keys.txt"),
    export_command: ("export runs/student runs/artifact", "export runs/student out --precision fp16 --format tensorrt"),
    models_command: ("models", "models --json"),
    inspect_command: (
        "inspect",
        "inspect runs/artifact",
        "inspect runs/artifact --run",
        "inspect runs/artifact --json",
    ),
    push_command: ("push runs/artifact owner/name --private", "push runs/artifact owner/name --dry-run"),
    build_tensorrt_command: ("build-tensorrt runs/artifact", "build-tensorrt runs/artifact --graph denoiser"),
    train_teacher_command: ("train-teacher runs/teacher", "train-teacher runs/better --start runs/teacher"),
    distill_command: (
        "distill runs/teacher runs/student",
        "distill ./my-teacher runs/student --prompts prompts.txt",
        "distill ./my-teacher runs/student --recipe lcm --pictures ./photographs",
    ),
    train_judge_command: (
        "train-judge runs/judge.safetensors",
        "train-judge judge.safetensors --font NotoColorEmoji.ttf",
    ),
    evaluate_command: ("evaluate -o evaluation", "evaluate runs/teacher runs/student --split validation --count 2048"),
    compare_command: (
        "compare pictures/teacher pictures/student",
        "compare pictures/teacher pictures/student --features facebook/dinov2-base --real pictures/real",
    ),
    study_command: (
        "study benchmarks/studies/shifted_target.yaml runs/teacher --judge runs/judge.safetensors -o runs/gamma",
        "study my-study.yaml -o runs/my-study",
    ),
    arena_command: (
        "arena runs/artifact owner/other-model --prompts prompts.txt",
        "arena pictures/teacher pictures/student --votes votes.jsonl",
    ),
}
for command, lines in COMMANDS.items():
    name = command.__name__.removesuffix("_command").replace("_", "-")
    app.command(name, epilog=examples(*lines))(command)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, flag("--version", help="Print the version and exit.")] = False
) -> None:
    set_quiet(False)  # what an earlier command of one Python process said
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"imagine-flash {version_of('imagine-flash')}")
        raise typer.Exit
    show_help(context)


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _value_of(error: BaseException) -> str:
    """The value that a usage error does not name: of one that was read by pydantic."""
    problems = getattr(error.__cause__, "errors", list)()
    return f", got {problems[0]['input']!r}" if problems else ""


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: libraries that are being imported make an error of their own of it."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, typer.Abort)):  # what typer makes of it
        error = error.__cause__ or error.__context__
    return error is not None


def _drop_results() -> None:
    """What could not be written is not tried again as Python ends, which would say so at length."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code_of(error: BaseException) -> int | None:
    """The exit code, once one line has said what a user got wrong; None of what is our fault."""
    if isinstance(error, Interrupted):
        return _fail(str(error), 130)
    if _was_interrupted(error):
        return _fail("interrupted", 130)
    if isinstance(error, ImagineFlashError):
        return _fail(str(error), 3 if isinstance(error, ParityError) else 2)
    if isinstance(error, OSError) and error.filename is not None:  # of the user's, which no command looked at before
        return _fail(f"cannot use {error.filename}: {(error.strerror or str(error)).lower()}")
    if isinstance(error, OSError) and error.errno in NO_ROOM:  # of what is open, such as standard output
        _drop_results()
        return _fail(f"cannot write a result: {(error.strerror or str(error)).lower()}; send it elsewhere")
    if hasattr(error, "format_message"):  # a usage error of the command line
        return _fail(f"{error.format_message().rstrip('.')}{_value_of(error)}. Try --help.")  # type: ignore[attr-defined]
    return None


def main() -> None:
    """Run the command line: what a user got wrong is one line on standard error and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if code == 130:  # what typer makes of Ctrl-C, without a word
            _fail("interrupted")
    except (Exception, KeyboardInterrupt) as error:
        code = _code_of(error)
        if code is None:
            raise
    sys.exit(code if isinstance(code, int) else 0)
