"""`imagine-flash generate`."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

FEW = 8  # pictures that are drawn before another backend would have been loaded

if TYPE_CHECKING:
    from ..engine import GenerateResult
    from ..folders.manifests import ModelDescription


def generate_command(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to draw, for example 'a fox on a pink background'.")
    ],
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
            help="The same seed draws the same picture, in any batch; by default random, and printed.",
        ),
    ] = None,
    count: Annotated[
        str, typer.Option(metavar="INTEGER", help="Pictures, 1 to 64; picture i has the seed SEED + i.")
    ] = "1",
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A .png, .jpg or .webp file, numbered where COUNT is above 1; a PNG remembers prompt, steps and seed; "
            "- is a PNG to standard output.",
        ),
    ] = Path("imagine-flash.png"),
    model: Annotated[
        Path | None,
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
            metavar="FILE", help="The part of IMAGE to redraw, in white; black pixels stay exactly as they are."
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

    piped = str(output) == "-"
    if piped and (json_ or count != "1"):
        raise ImagineFlashError("-o - is one picture and nothing else on standard output; leave out --json and --count")
    if not piped:
        image_format(output)
        writable(output)
    loras = parse_named(lora or ())
    values: dict[str, Any] = {
        "prompt": prompt,
        "steps": _number(steps),
        "seed": _number(seed),
        "count": _number(count),
        "width": _number(width),
        "height": _number(height),
        "guidance": _number(guidance, float),
        "negative_prompt": negative_prompt,
        "lora": {name: one.weight for name, one in loras.items()},
    }
    request = GenerateRequest(**values)
    described = model_options(entry, timesteps, sampler, prediction, any_steps, tiny_decoder, controlnet=controlnet)
    model = ready(
        model, described, backend, device=device, steps=request.steps, quality=quality, base=base, swaps=bool(loras)
    )
    if (backend, device, precision) == ("auto", "auto", "auto") and request.count <= FEW:
        backend = _soonest(model)
    names = {name: one.name for name, one in loras.items()}
    with Engine.load(model, backend=backend, device=device, precision=precision, loras=names) as engine:
        scales = {"strength": _number(strength, float), "condition_scale": _number(condition_scale, float)}
        files = {"image": image, "mask": mask, "condition": condition}
        if any(given is not None for given in (*scales.values(), *files.values())):
            _, size = engine.check(request)
            pictures = {name: _read(path, size, "L" if name == "mask" else "RGB") for name, path in files.items()}
            request = GenerateRequest(**values, **pictures, **scales)
        result, what = engine.generate(request), engine.describe()
    for line in [
        *notes(result, engine.tokenizer.nearest, model),
        *guidance_notes(engine.manifest, request.guidance),
        what,
    ]:
        note(line)
    note("  ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in result.timings.stages().items()))
    _hand_out(result, output, as_json=json_)


def _hand_out(result: GenerateResult, output: Path, *, as_json: bool) -> None:
    """Writes the pictures, and says where. Raises ImagineFlashError."""
    from ..engine.saving import png_bytes

    if str(output) == "-":
        sys.stdout.buffer.write(png_bytes(result.images[0], result.caption()))
        return
    paths = result.save(output)
    if as_json:
        say(json.dumps(_facts(result, paths)))
        return
    for i, path in enumerate(paths):
        say(f"{path} ({result.steps} steps, seed {result.seed + i})")


def _facts(result: GenerateResult, paths: list[Path]) -> dict[str, Any]:
    return {
        "files": [str(path) for path in paths],
        "steps": result.steps,
        "seed": result.seed,
        "lora": dict(result.loras),
        "timings": result.timings.stages(),
        "unknown_words": result.unknown_words,
        "replaced_words": result.replaced_words,
        "cut": result.cut,
    }


def notes(result: GenerateResult, nearest: Callable[[str], list[str]], model: Path | None) -> list[str]:
    """What the model made of words that it does not know, a line each. nearest: the known words that are spelled like one;
    model: its folder, None of the embedded one."""
    found = [f"note: read {typed!r} as {known!r}" for typed, known in result.replaced_words.items()]
    if result.unknown_words:
        words = [
            f"{word} (near: {', '.join(near)})" if (near := nearest(word)) else word for word in result.unknown_words
        ]
        inspect = shlex.join(["imagine-flash", "inspect", *([] if model is None else [str(model)])])
        found.append(f"note: this model has no word for {', '.join(words)}; drawn without; what it knows: {inspect}")
    if result.cut:
        found.append(f"note: the prompt is longer than this model reads; left out: {result.cut[:200]!r}")
    return found


def guidance_notes(model: ModelDescription, asked: float | None) -> list[str]:
    """A line where the scale asked for is none that the model was made for."""
    known = model.guidance
    low, high = known.range or (0.0, float("inf") if known.embedded or known.default > 1 else 1.0)
    if asked is None or low <= asked <= high or max(asked, high) <= 1:  # 0 and 1 are none, both
        return []
    made = f"{low:g} to {high:g}" if high > max(low, 1) else "1, which is none"
    return [f"note: {model.name} was made for guidance {made}; drawn with {asked:g}"]


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


def _read(path: Path | None, size: tuple[int, int], mode: str) -> Any:
    """A picture file as an array of the size (height, width): scaled to cover it, then cropped around the middle.

    mode RGB: uint8 (H, W, 3); L: float32 (H, W) in 0..1.
    """
    if path is None:
        return None
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert(mode)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "no picture that Pillow reads"
        raise ImagineFlashError(f"cannot read {path}: {reason}; give a PNG, JPEG or WebP file") from None
    pixels = np.array(ImageOps.fit(upright, (size[1], size[0])))
    return pixels if mode == "RGB" else pixels.astype(np.float32) / 255
