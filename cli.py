"""The command `imagine-flash`: one thin function per verb. What a verb needs is imported inside it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .core.errors import ImagineFlashError, missing_extra

if TYPE_CHECKING:
    from .engine import GenerateRequest, GenerateResult

app = typer.Typer(
    help="Distil a diffusion model into a 1-3 step student, export it, and draw with it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
bench = typer.Typer(help="Measure speed, checked and against a baseline, as a record.", no_args_is_help=True)
app.add_typer(bench, name="bench")
EMOJI = Path(__file__).resolve().parent / "assets" / "emoji"
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(help="What to draw, for example 'a fox on a pink background'.")],
    steps: Annotated[
        str | None, typer.Option(metavar="1|2|3", help="Network evaluations; by default the most.")
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(metavar="INTEGER", help="The same seed draws the same picture; by default a random one."),
    ] = None,
    count: Annotated[str, typer.Option(metavar="INTEGER", help="Pictures; picture i has the seed SEED + i.")] = "1",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, JPEG or WebP; numbered where COUNT > 1.")] = Path(
        "imagine-flash.png"
    ),
    model: Annotated[Path | None, typer.Option(help="An artifact folder; by default the embedded model.")] = None,
) -> None:
    """Draw a prompt in 1 to 3 network evaluations."""
    from .engine import Engine, GenerateRequest

    _image_format(output)
    _writable(output)
    request = GenerateRequest(prompt=prompt, steps=_whole(steps), seed=_whole(seed), count=_whole(count))
    engine = Engine.load(model)
    result = engine.generate(request)
    paths = _save(result, request, output)
    if result.unknown_words:
        words = ", ".join(result.unknown_words)
        _say(
            f"note: the model never saw the word{'s' if len(result.unknown_words) > 1 else ''} {words}; it draws something anyway"
        )
    _say("  ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in result.timings.items()))
    shown = paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
    _say(f"wrote {shown} ({result.steps} steps, seed {result.seed})")


@app.command("export")
def export_command(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="A student folder, made by distill.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The artifact folder to write.")],
    name: Annotated[str | None, typer.Option(help="What the model is called; by default the folder's name.")] = None,
) -> None:
    """Convert a student to ONNX, per stage and as whole samplers, and check every graph against torch."""
    _writable(out)
    _needs("export", "torch", "diffusers", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime")
    from .export import export_student

    manifest = export_student(student, out, name=name, progress=lambda stage: _say(f"{stage} ..."))
    for graph, errors in manifest.parity.items():
        _say(f"{graph:14} " + "  ".join(f"{kind} {error:.2g}" for kind, error in errors.items()))
    _say(f"wrote {out}; next: imagine-flash generate PROMPT --model {out}")


@app.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An artifact or a student folder.")],
) -> None:
    """Say what a folder holds; of an artifact, after checking the hash of every file."""
    from .core.artifact import STUDENT_FILE, read_artifact_manifest, read_student_manifest

    is_student = (folder / STUDENT_FILE).is_file()
    manifest: Any = read_student_manifest(folder) if is_student else read_artifact_manifest(folder)
    hidden = {"recipe"} if is_student else {"files", "graphs", "tokenizer", "scheduler"}
    for name, value in manifest.model_dump(mode="json", exclude=hidden).items():
        _say(f"{name}: {value}")
    if not is_student:
        for name, graph in manifest.graphs.items():
            takes = ", ".join(f"{t.name} {t.dtype} {t.shape}" for t in graph.inputs)
            _say(
                f"{name}: {graph.file} (opset {graph.opset}) {takes} -> {graph.outputs[0].name} {graph.outputs[0].shape}"
            )


@app.command("train-teacher")
def train_teacher_command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The pipeline folder to write; its state is kept in OUT.run.")
    ],
    recipe: Annotated[str, typer.Option(help="A built-in recipe's name or a YAML file.")] = "teacher",
    font: Annotated[Path | None, typer.Option(help="The Noto Color Emoji font, if it is in no usual place.")] = None,
) -> None:
    """Train a text-to-image teacher on emoji scenes, into a diffusers folder."""
    _training()
    from .distill.recipe import TeacherRecipe, load_recipe
    from .distill.teacher import train_teacher

    settings = load_recipe(recipe, TeacherRecipe)
    _writable(out)
    train_teacher(settings, out, font=font)
    _say(f"wrote {out}")


@app.command("distill")
def distill_command(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="A diffusers pipeline folder.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The student folder to write; its state is kept in OUT.run.")
    ],
    recipe: Annotated[str, typer.Option(help="A built-in recipe's name or a YAML file.")] = "imagine_flash",
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; else captions of emoji scenes.")] = None,
) -> None:
    """Distil a teacher into a student of 1, 2 and 3 steps."""
    _training()
    from .distill.data.prompts import read_prompts
    from .distill.recipe import DistillRecipe, load_recipe
    from .distill.student import distill

    settings = load_recipe(recipe, DistillRecipe)
    _writable(out)
    distill(teacher, out, settings, prompts=read_prompts(prompts) if prompts else None)
    _say(f"wrote {out}; next: imagine-flash export {out} ARTIFACT")


@app.command("train-judge")
def train_judge_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (safetensors).")],
    font: Annotated[Path | None, typer.Option(help="The Noto Color Emoji font, if it is in no usual place.")] = None,
) -> None:
    """Train the classifier that measures prompt fidelity and FD (judge)."""
    _training()
    from .benchmarks.judge import train_judge

    _writable(out)
    if out.is_dir():
        raise ImagineFlashError(f"cannot write {out}: it is a folder; name a file such as {out / 'judge.safetensors'}")
    figures = train_judge(out, font=font)
    _say(f"wrote {out}; right on {figures['accuracy']['seen']['all']:.2%} of unseen scenes")


@app.command("evaluate")
def evaluate_command(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="The teacher's pipeline folder.")] = EMOJI
    / "teacher",
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The student's folder.")] = EMOJI / "student",
    judge: Annotated[Path, typer.Option(help="What train-judge wrote.")] = EMOJI / "judge.safetensors",
    output: Annotated[Path, typer.Option("--output", "-o", help="Writes OUTPUT.json and OUTPUT.png.")] = Path(
        "evaluation"
    ),
    count: Annotated[int, typer.Option(help="Seen prompts.")] = 1024,
    held_out: Annotated[int, typer.Option(help="Prompts of held-out combinations.")] = 256,
    guidance: Annotated[float | None, typer.Option(help="The teacher's guidance; else the student's recipe's.")] = None,
) -> None:
    """Measure prompt fidelity and FD (judge); by default of the embedded teacher and student, in a checkout."""
    _training()
    from .benchmarks.evaluate import evaluate

    _writable(output)
    evaluate(teacher, student, judge, output, count=count, held_out=held_out, guidance=guidance)
    _say(f"wrote {output}.json and {output}.png")


@bench.command("kernels")
def bench_kernels_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Writes OUTPUT.json and OUTPUT.png.")] = Path(
        "kernels"
    ),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timings of each candidate.")] = 50,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest shapes only.")] = False,
) -> None:
    """Time the update, to_image and GroupNorm + SiLU against what users run instead."""
    _needs("bench", "torch", "diffusers", "matplotlib")
    from rich.console import Console

    from .benchmarks.kernels import bench_kernels
    from .benchmarks.records import as_rich

    _writable(output)
    Console().print(as_rich(bench_kernels(output, device=device, rounds=rounds, quick=quick)))
    _say(f"wrote {output}.json and {output}.png")


@bench.command("report")
def bench_report_command(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="A record that a bench command wrote.")],
    into: Annotated[Path, typer.Argument(metavar="FILE", help="The Markdown file whose table is replaced.")],
    marker: Annotated[
        str | None, typer.Option(help="The NAME of <!-- bench:NAME --> in FILE; by default the record's name.")
    ] = None,
) -> None:
    """Write a record's table into a Markdown file, and its plot beside the record."""
    _needs("bench", "matplotlib")
    from .benchmarks.harness import read_record
    from .benchmarks.records import plot, update_table_in

    found = read_record(record)
    update_table_in(into, found, marker or record.stem)
    plot(found, record.with_suffix(".png"))
    _say(f"wrote the table in {into} and {record.with_suffix('.png')}")


def _needs(extra: str, *packages: str) -> None:
    """One line that says what to install where a package is missing; and less noise from those that are there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _training() -> None:
    _needs("train", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "PIL", "yaml")


def _whole(text: str | None) -> Any:
    """The number that the text says, or the text itself: the request names the value that it cannot take."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def _image_format(path: Path) -> str:
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise ImagineFlashError(f"cannot write {path.name!r}: its ending must be one of {', '.join(IMAGE_FORMATS)}")
    return IMAGE_FORMATS[path.suffix.lower()]


def _writable(path: Path) -> None:
    """Refuse early, before minutes of work, what could not be written at the end."""
    parent = path.parent
    if not parent.is_dir():
        raise ImagineFlashError(f"cannot write {path}: {parent} is not a folder; make it first")
    if not os.access(parent, os.W_OK):
        raise ImagineFlashError(f"cannot write {path}: {parent} is read-only; choose another place")
    if path.suffix.lower() in IMAGE_FORMATS and path.is_dir():
        raise ImagineFlashError(f"cannot write {path}: it is a folder")


def _save(result: GenerateResult, request: GenerateRequest, output: Path) -> list[Path]:
    """Write each picture in one rename, with what drew it in a PNG's text."""
    try:
        from PIL import Image, PngImagePlugin
    except ImportError:
        raise missing_extra("pillow", "cpu") from None
    from .core.artifact import atomic_file

    paths = []
    for i, pixels in enumerate(result.images):
        path = output if request.count == 1 else output.with_name(f"{output.stem}-{i + 1}{output.suffix}")
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", f"{request.prompt}\nSteps: {result.steps}, Seed: {result.seed + i}")
        kind = _image_format(path)
        with atomic_file(path) as temporary:
            Image.fromarray(pixels).save(temporary, format=kind, **({"pnginfo": text} if kind == "PNG" else {}))
        paths.append(path)
    return paths


def _say(line: str) -> None:
    typer.echo(line)


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def main() -> None:
    """Run the command line: what a user got wrong is one line on standard error and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except ImagineFlashError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of the command line
            raise
        code = _fail(f"{error.format_message()} Try --help.")  # type: ignore[attr-defined]
    sys.exit(code if isinstance(code, int) else 0)
