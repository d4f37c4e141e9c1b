"""`imagine-flash export`, `inspect` and `build-tensorrt`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ImagineFlashError, ParityError
from .common import (
    AnySteps,
    Entry,
    Prediction,
    Quiet,
    SamplerName,
    Timesteps,
    flag,
    needs,
    note,
    say,
    say_sources,
    writable,
)

if TYPE_CHECKING:
    from ..folders.manifests import ArtifactManifest


NEXT = {
    "tensorrt": "tensorrt: on the machine with the GPU, run: imagine-flash build-tensorrt {out}",
    "triton-repository": "triton-repository: serve it with: tritonserver --model-repository {out}/triton_repository",
}


def export_command(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A student folder that distill made, a LoRA of one, or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The artifact folder to write.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="NAME", help="onnx (always), tensorrt, openvino or triton-repository; may be repeated."
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="fp32, fp16 or bf16; layers that need it stay in float32.")
    ] = "fp32",
    steps: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="The step counts to export; by default all of the student's.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="512x512,768x512", help="WIDTHxHEIGHT, the default one first; by default the student's size."
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="1-4", help="Pictures of one call, checked at both ends of the range.")
    ] = "1-4",
    whole: Annotated[
        bool | None,
        flag(
            "--whole-sampler/--stages",
            help="Only graphs of the whole sampler, or only graphs of its stages; by default both.",
        ),
    ] = None,
    tiny_decoder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="An AutoencoderTiny to decode with instead.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="The variant of the weights' files to read, such as fp16.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]", help="A LoRA to add, of diffusers, peft or kohya's format; may be repeated."
        ),
    ] = None,
    image_encoder: Annotated[
        bool, flag("--image-encoder/--no-image-encoder", help="Also the graph that image-to-image and inpainting need.")
    ] = True,
    check_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts to compare with torch on, one a line.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is called; by default the folder's name.")
    ] = None,
    opset: Annotated[
        int, typer.Option(metavar="INTEGER", help="20 to 24; below 23 attention and normalisation are decomposed.")
    ] = 23,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER", help="The lowest PSNR against torch's pictures, in dB, instead of the precision's."
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="The largest error against torch's tensors, instead of the precision's."),
    ] = None,
    int8: Annotated[bool, flag("--int8", help="Compress the OpenVINO weights to 8 bits with NNCF.")] = False,
    entry: Entry = None,
    timesteps: Timesteps = None,
    sampler: SamplerName = None,
    prediction: Prediction = None,
    any_steps: AnySteps = False,
    guidance: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="The guidance scale of requests that say none.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Convert a student to ONNX and more, and check every graph against torch."""
    writable(out, make=True)
    needs("export", "torch", "diffusers", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime", "filelock")
    from ..export import export_student
    from ..export.options import ExportOptions, parse_batch, parse_sizes, parse_steps, read_prompts
    from ..models.describe import ModelOptions, parse_timesteps
    from ..models.student import student_of
    from ..pipelines.lora import parse_lora

    chosen: dict[str, Any] = {"formats": tuple(formats or ["onnx"]), "precision": precision}  # names not yet checked
    options = ExportOptions(
        **chosen,
        name=name,
        steps=parse_steps(steps),
        opset=opset,
        sizes=parse_sizes(sizes),
        batch=parse_batch(batch),
        tiny_decoder=tiny_decoder,
        variant=variant,
        loras=tuple(map(parse_lora, lora or ())),
        psnr=min_psnr,
        error=max_error,
        image_encoder=image_encoder,
        forms="both" if whole is None else "whole-sampler" if whole else "stages",
        int8=int8,
        prompts=None if check_prompts is None else read_prompts(check_prompts),
    )
    described = ModelOptions(
        steps=options.steps,
        entry=entry,
        any_steps=any_steps,
        sampler=sampler,  # type: ignore[arg-type]  (checked there)
        prediction=prediction,
        guidance=guidance,
        timesteps=parse_timesteps(timesteps),
    )
    student = str(student_of(student, described))
    say_sources(Path(student))
    with progress_bar() as progress:
        manifest = export_student(student, out, options=options, progress=progress)
    if not quiet:
        _print_parity(manifest, stderr=True)
    for kind in manifest.formats.keys() & NEXT.keys():
        note(NEXT[kind].format(out=out))
    say(str(out))
    note(f"next: {_next_of(manifest, out)}")


def _next_of(manifest: ArtifactManifest, out: Path) -> str:
    if manifest.precision == "bf16":  # for want of kernels
        return "TensorRT or a GPU: no CPU runs bf16 graphs; for a CPU export with --precision fp32, which OpenVINO lowers itself"
    return f"imagine-flash generate PROMPT --model {out}"


def inspect_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An artifact or a student folder.")],
    run: Annotated[
        bool, flag("--run", help="Draw the artifact's reference pictures here and compare them with torch's.")
    ] = False,
) -> None:
    """Say what a folder holds; of an artifact, after checking the hash of every file."""
    from ..folders.files import STUDENT_FILE
    from ..folders.reading import read_artifact_manifest, read_student_manifest

    if (folder / STUDENT_FILE).is_file():
        if run:
            raise ImagineFlashError(
                f"{folder} is a student; --run draws with an artifact: imagine-flash export {folder} OUT"
            )
        for field, value in read_student_manifest(folder).model_dump(mode="json", exclude={"recipe"}).items():
            say(f"{field}: {value}")
        return
    manifest = read_artifact_manifest(folder)
    hidden = {"vocabulary", "files", "graphs", "tokenizers", "scheduler", "parity", "references"}
    for field, value in manifest.model_dump(mode="json", exclude=hidden).items():
        say(f"{field}: {value}")
    _print_words(manifest)
    _print_graphs(manifest)
    _print_parity(manifest)
    if run:
        _verify(folder)


def build_tensorrt_command(
    folder: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Exported with --format tensorrt.")],
    graphs: Annotated[
        list[str] | None,
        typer.Option("--graph", metavar="NAME", help="Only this graph; may be repeated; by default all."),
    ] = None,
    version_compatible: Annotated[
        bool,
        flag(
            "--version-compatible", help="Plans that later TensorRTs of the same major version load, a little slower."
        ),
    ] = False,
    refit: Annotated[bool, flag("--refit", help="Plans whose weights can be replaced.")] = False,
) -> None:
    """Build TensorRT plans, on the machine with the GPU that will run them."""
    from ..export.tensorrt import build_plans

    with progress_bar() as progress:
        paths = build_plans(
            folder,
            graphs=graphs,
            version_compatible=version_compatible,
            refit=refit,
            progress=lambda what: progress(what, 0),
        )
    for path in paths:
        say(str(path))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int], None]]:
    """A progress bar: call it with what is being done and how many such things there are in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=None)
        started = False

        def tell(what: str, total: int) -> None:
            nonlocal started
            progress.update(task, description=what, total=total or None, advance=int(started))
            started = True

        yield tell


def _print_words(manifest: ArtifactManifest) -> None:
    """What a model with a known vocabulary draws."""
    known = sorted({word for tokenizer in manifest.tokenizers for word in tokenizer.known_words})
    for group, words in manifest.vocabulary.items():
        say(f"draws {group}: {', '.join(words)}")
    if known:
        say(f"knows {len(known)} words: {' '.join(known)}")


def _print_graphs(manifest: ArtifactManifest) -> None:
    for name, graph in manifest.graphs.items():
        takes = ", ".join(f"{t.name} {t.dtype} {t.shape}" for t in graph.inputs)
        gives = ", ".join(f"{t.name} {t.dtype} {t.shape}" for t in graph.outputs)
        say(f"{name}: {graph.file} (opset {graph.opset}) {takes} -> {gives}")
        if graph.islands and not name.startswith("sampler"):
            say(f"  in float32: {', '.join(graph.islands)}")


def _print_parity(manifest: ArtifactManifest, *, stderr: bool = False) -> None:
    """What the gate measured, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="against torch")
    table.add_column("graph", no_wrap=True)
    for heading in ("tensors: largest error", "RMS", "images: levels", "PSNR, dB"):
        table.add_column(heading, justify="right")
    for name, errors in manifest.parity.items():
        tensors = [v for kind, v in errors.items() if not kind.endswith("_rms") and kind not in ("images", "psnr")]
        rms = [value for kind, value in errors.items() if kind.endswith("_rms")]
        row = [f"{max(tensors):.2g}" if tensors else "", f"{max(rms):.2g}" if rms else ""]
        row += [
            f"{errors['images']:g}" if "images" in errors else "",
            f"{errors['psnr']:.1f}" if "psnr" in errors else "",
        ]
        table.add_row(name, *row)
    Console(stderr=stderr).print(table)


def _verify(folder: Path) -> None:
    from ..engine import Engine
    from ..folders.reading import read_artifact_manifest

    failed: list[Any] = []
    for found in Engine.load(folder, precision=read_artifact_manifest(folder).precision).verify():
        reference = found.reference
        say(
            f"{'ok  ' if found.passed else 'FAIL'} {reference.prompt!r}, seed {reference.seed}, {reference.steps} steps, "
            f"{reference.size[1]}x{reference.size[0]}: PSNR {found.psnr:.1f} dB, largest difference {found.levels} of 255"
        )
        failed += [] if found.passed else [reference]
    if failed:
        raise ParityError(f"{len(failed)} of the reference pictures of {folder} are drawn differently here")
