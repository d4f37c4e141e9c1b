"""`imagine-flash generate`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ImagineFlashError
from .common import (
    AnySteps,
    Base,
    ControlNet,
    Entry,
    Loras,
    Prediction,
    Quiet,
    SamplerName,
    Timesteps,
    TinyDecoder,
    flag,
    model_options,
    note,
    say,
    writable,
)
from .drawn import draw_many, guidance_notes, hand_out, notes

FEW = 8  # pictures that are drawn before another backend would have been loaded


def generate_command(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What to draw, for example 'a fox on a pink background'.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw every line of a text file into the folder OUTPUT: prompt i with SEED + i as its picture i, and what drew "
            "them in metadata.jsonl; the same command goes on with what is missing. general: 2,000 prompts that are built in.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="1|2|3", help="Network evaluations; by default the most that the model was distilled for."
        ),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="INTEGER",
            help="The same seed draws the same picture, in any batch; by default random, and printed; with --prompts 0.",
        ),
    ] = None,
    count: Annotated[
        str, typer.Option(metavar="INTEGER", help="Pictures, 1 to 64; picture i has the seed SEED + i.")
    ] = "1",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A .png, .jpg or .webp file, numbered where COUNT is above 1; a PNG remembers prompt, steps and seed; "
            "- is a PNG to standard output; by default imagine-flash.png.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="An artifact or student folder, any diffusers folder, a hub id or a name of `imagine-flash models`; by default "
            "the embedded model.",
        ),
    ] = None,
    width: Annotated[str | None, typer.Option(metavar="PIXELS", help="By default the model's first size.")] = None,
    height: Annotated[str | None, typer.Option(metavar="PIXELS", help="By default the model's first size.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture to start from; it is scaled and cropped to the size.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The part of IMAGE to redraw, white or transparent; other pixels stay exactly as they are.",
        ),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER", help="How much of IMAGE to redraw, above 0 to 1; by default 0.75, or 1 with a mask."
        ),
    ] = None,
    controlnet: ControlNet = None,
    condition: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The conditioning picture, already prepared; it is scaled and cropped to the size."
        ),
    ] = None,
    condition_scale: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="How strongly CONDITION holds, 0 to 10; by default 1.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="openvino, onnxruntime or tensorrt; for a student torch, torch-compile or torch-graph; by default the "
            "one that finishes first: for up to 8 pictures onnxruntime, which loads fastest.",
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cpu, cuda or cuda:N; onnxruntime's tensorrt, tensorrt:N, directml and coreml; Intel's gpu, gpu:N and npu; by "
            "default what the backend finds.",
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fp32, bf16, fp16 or int8, for a student in torch also fp8; by default int8 where the artifact holds it, else "
            "the fastest that reproduces its reference pictures; of a "
            "student fp32 on a CPU and bf16 on a GPU.",
        ),
    ] = "auto",
    guidance: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="How strongly the prompt pulls; 1 is none; by default the model's own."),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to draw away from, where guidance is above 1.")
    ] = None,
    entry: Entry = None,
    base: Base = None,
    timesteps: Timesteps = None,
    sampler: SamplerName = None,
    prediction: Prediction = None,
    any_steps: AnySteps = False,
    tiny_decoder: TinyDecoder = None,
    lora: Loras = None,
    quality: Annotated[
        bool,
        flag("--quality", help="The model's own decoder; by default, on a CPU, a tiny one where the catalogue has it."),
    ] = False,
    json_: Annotated[bool, flag("--json", help="Print files, seed, steps, timings and words as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Draw a prompt in 1 to 3 network evaluations."""
    from ..engine import Engine, GenerateRequest
    from ..engine.saving import image_format
    from ..folders.loras import parse_named
    from .first_run import ready

    files = {"image": image, "mask": mask, "condition": condition}
    scales = {"strength": strength, "condition-scale": condition_scale}
    texts = _texts(prompt, prompts, output, **files, **scales, json=json_, count=count != "1")
    output = output or Path("imagine-flash.png")
    piped = str(output) == "-"
    if piped and (json_ or count != "1"):
        raise ImagineFlashError("-o - is one picture and nothing else on standard output; leave out --json and --count")
    if piped and sys.stdout is None:
        raise ImagineFlashError("-o - writes to standard output, which is closed; name a file")
    if not piped:
        writable(output)
    if not piped and not texts:
        image_format(output)
    loras = parse_named(lora or ())
    values: dict[str, Any] = {
        "prompt": texts[0] if texts else prompt,
        "steps": _number(steps),
        "seed": _number(seed or ("0" if texts else None)),
        "count": _number(count),
        "width": _number(width),
        "height": _number(height),
        "guidance": _number(guidance, float),
        "negative_prompt": negative_prompt,
        "lora": {name: one.weight for name, one in loras.items()},
    }
    request = GenerateRequest(**values)
    described = model_options(entry, timesteps, sampler, prediction, any_steps, tiny_decoder, controlnet=controlnet)
    folder = ready(
        model, described, backend, device=device, steps=request.steps, quality=quality, base=base, swaps=bool(loras)
    )
    if (backend, device, precision) == ("auto", "auto", "auto") and max(request.count, len(texts)) <= FEW:
        backend = _soonest(folder)
    names = {name: one.name for name, one in loras.items()}
    with Engine.load(folder, backend=backend, device=device, precision=precision, loras=names) as engine:
        if texts:
            drawn = draw_many(engine, texts, output, values)
            for line in [*drawn.notes(), engine.describe()]:
                note(line)
            return say(f"{output} ({len(texts)} pictures, {drawn.new} of them new)")
        scales = {"strength": _number(strength, float), "condition_scale": _number(condition_scale, float)}
        if any(given is not None for given in (*scales.values(), *files.values())):
            _, size = engine.check(request)
            pictures = {name: read_picture_file(path, name, size) for name, path in files.items()}
            request = GenerateRequest(**values, **pictures, **scales)
        result, what = engine.generate(request), engine.describe()
    for line in [
        *notes(result, engine.tokenizer.nearest, folder),
        *guidance_notes(engine.manifest, request.guidance),
        what,
    ]:
        note(line)
    note("  ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in result.timings.stages().items()))
    hand_out(result, output, as_json=json_)


def _texts(prompt: str | None, prompts: Path | None, output: Path | None, **given: Any) -> list[str]:
    """The lines of --prompts; none where a PROMPT is drawn. Raises ImagineFlashError."""
    if (prompt is None) == (prompts is None):
        both = "a PROMPT and --prompts; leave out one" if prompts else "nothing to draw"
        raise ImagineFlashError(f"got {both}: a PROMPT is drawn into a file, the lines of --prompts FILE into a folder")
    if prompts is None:
        return []
    if named := [name for name, value in given.items() if value]:
        raise ImagineFlashError(f"--prompts draws a folder from text alone; leave out --{named[0]}")
    from ..engine.saving import IMAGE_FORMATS

    if output is None or output.suffix.lower() in IMAGE_FORMATS or str(output) == "-":
        raise ImagineFlashError(f"--prompts needs a folder for its pictures, got {output or 'none'}: -o FOLDER")
    from ..distill.data.prompts import read_prompts

    return read_prompts(prompts)


def _soonest(model: Path | None) -> str:
    """The backend for a process that draws a few pictures and ends: onnxruntime loads the embedded model in 0.1 s, OpenVINO
    in 0.4, and a picture takes some 10 ms with either."""
    from ..folders.files import ARTIFACT_FILE

    is_artifact = model is None or (model / ARTIFACT_FILE).is_file()
    alone = is_artifact and not os.path.exists("/dev/nvidiactl")
    return "onnxruntime" if alone and importlib.util.find_spec("onnxruntime") else "auto"


def _number(text: str | None, kind: Callable[[str], Any] = int) -> Any:
    """The number that the text says, or the text itself: the request names the value that it cannot take."""
    try:
        return None if text is None else kind(text)
    except ValueError:
        return text


def read_picture_file(path: Path | None, kind: str, size: tuple[int, int]) -> Any:
    """A picture file as an array of the size (height, width), read as the server reads uploads: scaled to cover it, then cropped
    around the middle. kind: image and condition are uint8 (H, W, 3), mask is float32 (H, W) in 0..1. Raises ImagineFlashError.
    """
    if path is None:
        return None
    import numpy as np
    from PIL import Image

    from ..engine.pictures.reader import Unreadable, read_picture

    height, width = size
    try:
        data = read_picture(
            path.read_bytes(), kind, (width, height), 2 * (Image.MAX_IMAGE_PIXELS or 2**40), formats=None
        )
    except OSError as error:
        raise ImagineFlashError(f"cannot read {path}: {error.strerror}; give a PNG, JPEG or WebP file") from None
    except Unreadable as error:
        raise ImagineFlashError(f"cannot read {path}: it {error}") from None
    pixels = np.frombuffer(data, np.uint8)
    if kind == "mask":
        return pixels.reshape(height, width).astype(np.float32) / 255
    return pixels.reshape(height, width, 3)
