"""`imagine-flash export` and `build-tensorrt`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ArtifactError
from .common import (
    AnySteps,
    Base,
    ControlNet,
    Entry,
    Prediction,
    Quiet,
    SamplerName,
    Timesteps,
    TinyDecoder,
    flag,
    model_options,
    needs,
    note,
    progress_bar,
    say,
    say_sources,
    writable,
)
from .first_run import say_needs
from .inspecting import print_parity

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
    any_size: Annotated[
        str | None,
        typer.Option(
            metavar="256-1024",
            help="One graph for all sizes whose sides lie between these, in the multiples that the network needs; of UNets (Stable "
            "Diffusion 1.x, 2.x, XL). --sizes are then those offered by name.",
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
    tiny_decoder: TinyDecoder = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="The variant of the weights' files to read, such as fp16.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]", help="A LoRA to add, of diffusers, peft or kohya's format; may be repeated."
        ),
    ] = None,
    controlnet: ControlNet = None,
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
    int8: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the OpenVINO files, with NNCF: weights (8 bits, less memory) or full (8-bit products too, faster).",
        ),
    ] = None,
    entry: Entry = None,
    base: Base = None,
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
    from ..export.options import ExportOptions, parse_any_size, parse_batch, parse_sizes, parse_steps, read_prompts
    from ..models.student import student_of
    from ..pipelines.lora import parse_lora
    from ..pipelines.single_file import unpacked

    for option, limit in {"--min-psnr": min_psnr, "--max-error": max_error}.items():
        if limit is not None and not limit > 0:
            raise ArtifactError(f"{option} must be a number above 0, got {limit:g}")
    # names not yet checked
    chosen: dict[str, Any] = {"formats": tuple(formats or ["onnx"]), "precision": precision, "int8": int8}
    options = ExportOptions(
        **chosen,
        name=name,
        steps=parse_steps(steps),
        opset=opset,
        sizes=parse_sizes(sizes),
        any_size=parse_any_size(any_size),
        batch=parse_batch(batch),
        variant=variant,
        loras=tuple(map(parse_lora, lora or ())),
        psnr=min_psnr,
        error=max_error,
        image_encoder=image_encoder,
        forms="both" if whole is None else "whole-sampler" if whole else "stages",
        prompts=None if check_prompts is None else read_prompts(check_prompts),
    )
    described = model_options(
        entry,
        timesteps,
        sampler,
        prediction,
        any_steps,
        tiny_decoder,
        steps=options.steps,
        guidance=guidance,
        controlnet=controlnet,
    )
    student = str(student_of(unpacked(student, base=base, entry=entry), described))
    say_sources(Path(student))
    say_needs(Path(student))
    with progress_bar() as progress:
        manifest = export_student(student, out, options=options, progress=progress)
    if not quiet:
        print_parity(manifest, stderr=True)
    for kind in manifest.formats.keys() & NEXT.keys():
        note(NEXT[kind].format(out=out))
    say(str(out))
    note(f"next: {_next_of(manifest, out)}")


def _next_of(manifest: ArtifactManifest, out: Path) -> str:
    if manifest.precision == "bf16":  # for want of kernels
        return "TensorRT or a GPU: no CPU runs bf16 graphs; for a CPU export with --precision fp32, which OpenVINO lowers itself"
    return f"imagine-flash generate PROMPT --model {out}"


def build_tensorrt_command(
    folder: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Exported with --format tensorrt.")],
    graphs: Annotated[
        list[str] | None,
        typer.Option("--graph", metavar="NAME", help="Only this graph; may be repeated; by default all stages."),
    ] = None,
    whole_sampler: Annotated[
        bool, flag("--whole-sampler", help="Also those of the whole sampler, each of its steps a copy of the network.")
    ] = False,
    version_compatible: Annotated[
        bool,
        flag(
            "--version-compatible", help="Plans that later TensorRTs of the same major version load, a little slower."
        ),
    ] = False,
    refit: Annotated[bool, flag("--refit", help="Plans whose weights can be replaced.")] = False,
    quiet: Quiet = False,
) -> None:
    """Build TensorRT plans, on the machine with the GPU that will run them."""
    from ..export.tensorrt import build_plans

    with progress_bar() as progress:
        paths = build_plans(
            folder,
            graphs=graphs,
            whole_sampler=whole_sampler,
            version_compatible=version_compatible,
            refit=refit,
            progress=lambda what: progress(what, 0),
        )
    for path in paths:
        say(str(path))
