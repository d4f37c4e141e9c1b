"""What an export is asked for, checked before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ..core.checked import Checked
from ..core.errors import ArtifactError, nearest
from ..folders.manifests import Size
from ..pipelines.lora import Lora
from .ledger import LIMITS, Limits

Precision = Literal["fp32", "fp16", "bf16"]
Format = Literal["onnx", "tensorrt", "openvino", "triton-repository"]
Forms = Literal["both", "stages", "whole-sampler"]
FREE = ("onnx", "openvino")  # formats whose graphs may have their sides free
OPSETS = range(20, 25)
PRECISIONS: dict[str, tuple[str, ...]] = {  # of the ONNX graphs, by what is made of them
    "onnx": get_args(Precision),
    "tensorrt": get_args(Precision),
    "openvino": ("fp32",),  # it lowers the precision itself, at load
    "triton-repository": ("fp32", "fp16"),  # onnxruntime has too few kernels for bf16
}
MAX_BATCH = 63  # from 64 on, diffusers' Upsample2D takes another way


class ExportOptions(Checked):
    """How to export. Keyword-only, frozen; ArtifactError in one line for what cannot be done.

    name: what the model is called; None takes the folder's. sizes: of the images, (height, width); the first is the default;
    None takes the student's. any_size: the smallest and the largest side of what one set of graphs is to draw; `sizes` are then
    the ones of these that are offered by name, and the gate draws two more. batch: the smallest and the largest that is checked
    and built for. steps: the plans; None takes all. forms: graphs of the stages, of the whole sampler, or both. tiny_decoder: an
    AutoencoderTiny folder that replaces the student's decoder. variant: of the student's files, such as fp16. loras: are added
    to its weights, in this order. image_encoder: also the graph that drawing from a picture needs. prompts: what the gate draws.
    psnr (dB) and error replace the precision's limits. int8: of the OpenVINO files, the weights alone or the products too. gated:
    the one plan that the gate draws; None: all.
    """

    refusal = ArtifactError

    name: str | None = None
    formats: tuple[Format, ...] = ("onnx",)
    precision: Precision = "fp32"
    steps: tuple[int, ...] | None = None
    sizes: tuple[Size, ...] | None = None
    any_size: tuple[int, int] | None = None
    batch: tuple[int, int] = (1, 4)
    forms: Forms = "both"
    tiny_decoder: Path | None = None
    loras: tuple[Lora, ...] = ()
    variant: str | None = None
    prompts: tuple[str, ...] | None = None
    gated: int | None = None
    opset: int = 23
    psnr: float | None = Field(default=None, gt=0)
    error: float | None = Field(default=None, gt=0)
    int8: Literal["weights", "full"] | None = None
    image_encoder: bool = True

    @classmethod
    def one_line(cls, name: str, kind: str, message: str, value: Any) -> str:
        """The option and what is wrong with it; its own validators say all of it."""
        if kind == "extra_forbidden":
            return f"an export has no option {name!r}{nearest(name, cls.model_fields)}"
        message = message.removeprefix("Value error, ")
        if kind == "value_error":
            return message if name in ("", "opset", "batch") else f"{name} {message}"
        return f"{name}: {message.lower()}, got {value!r}"

    @property
    def with_image_encoder(self) -> bool:
        """A whole-sampler artifact starts from noise alone."""
        return self.image_encoder and self.forms != "whole-sampler"

    @field_validator("opset")
    @classmethod
    def _opset_is_known(cls, opset: int) -> int:
        if opset not in OPSETS:
            raise ValueError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
        return opset

    @field_validator("batch")
    @classmethod
    def _batch_is_a_range(cls, batch: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= batch[0] <= batch[1] <= MAX_BATCH:
            raise ValueError(
                f"batch must run upwards from 1 to at most {MAX_BATCH}, got {batch[0]}-{batch[1]}; try 1-4"
            )
        return batch

    @field_validator("sizes", "steps", "prompts", "formats")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values is not None and not values:
            raise ValueError("must not be empty")
        return None if values is None else tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _formats_have_the_precision(self) -> ExportOptions:
        for kind in self.formats:
            if self.precision not in PRECISIONS[kind]:
                can = " or ".join(PRECISIONS[kind])
                raise ValueError(f"the format {kind} takes precision {can}, got {self.precision}")
        if self.int8 and "openvino" not in self.formats:
            raise ValueError("int8 is made for the format openvino; add --format openvino")
        if self.forms == "whole-sampler" and "openvino" in self.formats:
            raise ValueError("the format openvino is written for stages; leave out --whole-sampler, or the format")
        return self

    @model_validator(mode="after")
    def _any_size_is_of_stages(self) -> ExportOptions:
        if self.any_size is None:
            return self
        if fixed := [kind for kind in self.formats if kind not in FREE]:
            raise ValueError(
                f"any_size goes with the formats {' and '.join(FREE)}; leave it out for {fixed[0]}, and name sizes"
            )
        if self.forms == "whole-sampler":
            raise ValueError(
                "graphs of the whole sampler are of one size each; leave out any_size, or export the stages"
            )
        return self

    @property
    def limits(self) -> Limits:
        """What the gate allows: the precision's limits, but for those given."""
        default = LIMITS[self.precision]
        return Limits(
            error=self.error or default.error,
            rms=default.rms,
            levels=default.levels if self.psnr is None else float("inf"),
            psnr=self.psnr or default.psnr,
        )


def parse_sizes(text: str | None) -> tuple[Size, ...] | None:
    """ "512x512,768x512" (width x height) -> (height, width) each. Raises ArtifactError."""
    if text is None:
        return None
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", part)
        if not found:
            raise ArtifactError(f"a size is WIDTHxHEIGHT such as 512x512, got {part.strip()!r}")
        sizes.append((int(found[2]), int(found[1])))
    return tuple(sizes)


def parse_any_size(text: str | None) -> tuple[int, int] | None:
    """ "256-1024" -> (smallest, largest). Raises ArtifactError."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,5})-(\d{1,5})\s*", text)
    if not found:
        raise ArtifactError(f"any size is a range of sides such as 256-1024, got {text!r}")
    return int(found[1]), int(found[2])


def parse_batch(text: str) -> tuple[int, int]:
    """ "4" or "1-4" -> (smallest, largest). Raises ArtifactError."""
    found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", text)
    if not found:
        raise ArtifactError(f"a batch is a number or a range such as 1-4, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def parse_steps(text: str | None) -> tuple[int, ...] | None:
    """ "1,2,3" -> (1, 2, 3). Raises ArtifactError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not re.fullmatch(r"\d{1,3}", part)), None)
    if wrong is not None:
        raise ArtifactError(f"steps are whole numbers such as 1,2,3, got {wrong!r}")
    return tuple(int(part) for part in parts)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty. Raises ArtifactError."""
    try:
        prompts = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ArtifactError(f"cannot read the prompts of {path}: {reason}") from None
    if not prompts:
        raise ArtifactError(f"{path} holds no prompts; write one a line")
    return prompts
