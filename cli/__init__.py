"""The command `imagine-flash`: one thin function per verb. What a verb needs is imported inside it."""

from __future__ import annotations

import sys

import typer

from ..core.errors import ImagineFlashError, ParityError
from .bench import bench
from .exporting import build_tensorrt_command, export_command, inspect_command
from .generate import generate_command
from .serve import serve_command
from .training import distill_command, evaluate_command, train_judge_command, train_teacher_command

app = typer.Typer(
    help="Distil a diffusion model into a 1-3 step student, export it, and draw with it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
for command in (
    generate_command, serve_command, export_command, inspect_command, build_tensorrt_command,
    train_teacher_command, distill_command, train_judge_command, evaluate_command,
):  # fmt: skip
    app.command(command.__name__.removesuffix("_command").replace("_", "-"))(command)
app.add_typer(bench, name="bench")


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def main() -> None:
    """Run the command line: what a user got wrong is one line on standard error and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except ImagineFlashError as error:
        code = _fail(str(error), 3 if isinstance(error, ParityError) else 2)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of the command line
            raise
        code = _fail(f"{error.format_message()} Try --help.")  # type: ignore[attr-defined]
    sys.exit(code if isinstance(code, int) else 0)
