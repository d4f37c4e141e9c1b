"""`imagine-flash generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import missing_extra
from .common import image_format, say, writable

if TYPE_CHECKING:
    from ..engine import GenerateRequest, GenerateResult


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
    width: Annotated[str | None, typer.Option(metavar="PIXELS", help="By default the artifact's first size.")] = None,
    height: Annotated[str | None, typer.Option(metavar="PIXELS", help="By default the artifact's first size.")] = None,
) -> None:
    """Draw a prompt in 1 to 3 network evaluations."""
    from ..engine import Engine, GenerateRequest

    image_format(output)
    writable(output)
    request = GenerateRequest(
        prompt=prompt, steps=_whole(steps), seed=_whole(seed), count=_whole(count), width=_whole(width),
        height=_whole(height),
    )  # fmt: skip
    engine = Engine.load(model)
    result = engine.generate(request)
    paths = _save(result, request, output)
    if result.unknown_words:
        words = ", ".join(result.unknown_words)
        say(
            f"note: the model never saw the word{'s' if len(result.unknown_words) > 1 else ''} {words}; it draws something anyway"
        )
    say("  ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in result.timings.stages().items()))
    shown = paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
    say(f"wrote {shown} ({result.steps} steps, seed {result.seed})")


def _whole(text: str | None) -> Any:
    """The number that the text says, or the text itself: the request names the value that it cannot take."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def _save(result: GenerateResult, request: GenerateRequest, output: Path) -> list[Path]:
    """Write each picture in one rename, with what drew it in a PNG's text."""
    try:
        from PIL import Image, PngImagePlugin
    except ImportError:
        raise missing_extra("pillow", "cpu") from None
    from ..core.artifact import atomic_file

    paths = []
    for i, pixels in enumerate(result.images):
        path = output if request.count == 1 else output.with_name(f"{output.stem}-{i + 1}{output.suffix}")
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", f"{request.prompt}\nSteps: {result.steps}, Seed: {result.seed + i}")
        kind = image_format(path)
        with atomic_file(path) as temporary:
            Image.fromarray(pixels).save(temporary, format=kind, **({"pnginfo": text} if kind == "PNG" else {}))
        paths.append(path)
    return paths
