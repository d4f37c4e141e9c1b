"""Whether a request asks for what an engine draws: each raises RequestError where it does not."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import RequestError, nearest
from ..folders.manifests import ModelDescription
from ..folders.sizes import AnySize, Size, size_name, sizes_text
from .request import GenerateRequest

RESULT_BYTES = 2**30  # of one request's pictures


def is_drawn(size: Size, sizes: Sequence[Size], free: AnySize | None) -> bool:
    """Whether it is one of the sizes, or in the range of those that are free."""
    return size in sizes or (free is not None and free.holds(size))


def check_size(request: GenerateRequest, sizes: Sequence[Size], free: AnySize | None) -> Size:
    """The request's size, by default the first."""
    height, width = sizes[0]
    size = (request.height or height, request.width or width)
    if not is_drawn(size, sizes, free):
        near = f"; try {size_name(free.nearest(size))}" if free else ""
        raise RequestError(f"this engine draws {sizes_text(sizes, free)}, got {size_name(size)}{near}", param="size")
    if (needed := 3 * size[0] * size[1] * request.count) > RESULT_BYTES:
        most = RESULT_BYTES // (3 * size[0] * size[1])
        raise RequestError(
            f"{request.count} pictures of {size_name(size)} take {needed:,} bytes; at most {most} at once", param="n"
        )
    return size


def check_guidance(request: GenerateRequest, model: ModelDescription, route: str) -> None:
    """For guidance or a negative prompt that nothing would be done with."""
    known = model.guidance
    scale = known.default if request.guidance is None else request.guidance
    if request.negative_prompt and (known.embedded or scale <= 1):
        why = "it is told its guidance" if known.embedded else f"guidance is {scale:g}; above 1 it draws away from it"
        raise RequestError(f"{model.name} reads no negative prompt here: {why}", param="negative_prompt")
    if route == "sampler" and scale > 1 and not known.embedded:
        raise RequestError("whole-sampler graphs draw without guidance; load the route 'stages'", param="guidance")


def check_loras(request: GenerateRequest, loras: Sequence[str]) -> None:
    """For a LoRA that the engine was not loaded with."""
    for name in request.lora or ():
        if name not in loras:
            known = f"it has {', '.join(loras)}" if loras else "none was loaded"
            raise RequestError(f"no LoRA {name[:100]!r}{nearest(name, loras)}; {known}", param="lora")


def check_image(model: ModelDescription, *, is_read: bool) -> None:
    """For an engine that reads no picture to start from."""
    if not is_read:
        raise RequestError(
            f"{model.name} cannot start from a picture: that needs the route 'stages' and an artifact with "
            "an image encoder; run 'imagine-flash export STUDENT OUT --image-encoder'"
        )


def check_condition(model: ModelDescription) -> None:
    """For a model that reads no conditioning picture."""
    if model.control is None:
        raise RequestError(
            f"{model.name} reads no conditioning picture: it has no ControlNet or T2I-adapter; name one with "
            "--controlnet where it is loaded or exported",
            param="condition",
        )
