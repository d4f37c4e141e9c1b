"""Requests and answers as the OpenAI API has them, with fields of our own beside."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, field_validator, model_validator

from ...core.errors import RequestError
from ...folders.sizes import AnySize, Size
from ..pictures.files import Format
from ..request import MAX_COUNT, MAX_GUIDANCE, MAX_SCALE, MAX_SEED

MAX_PROMPT = 32_000  # characters; the model reads fewer, and says what it left out
MAX_SIDE = 4096  # of a picture that is scaled to what was asked for
OPENAI_MODELS = re.compile(r"(dall-e|gpt-image|chatgpt-image)[\w.-]*")
IGNORED = "taken and ignored"
Text = Annotated[str | None, Field(max_length=4000, description=IGNORED)]


class ImageRequest(BaseModel):
    """What may be asked of any picture: OpenAI's fields, then ours. Null is as if it was not there; fields of others that have
    no meaning here are taken and named in the header x-ignored, unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = Field(default=None, max_length=200, description="this one, an alias, or a name of OpenAI's")
    n: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    size: str | None = Field(default=None, max_length=20, description="WIDTHxHEIGHT, scaled to if need be, or auto")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100, description="of jpeg and webp")
    stream: StrictBool | None = Field(default=None, description="server-sent events")
    partial_images: int | None = Field(default=None, ge=0, le=3, description="streamed before: one step's, if not 0")
    seed: int | None = Field(default=None, ge=-1, le=MAX_SEED, description="-1 is a random one; picture i has seed + i")
    steps: int | None = Field(default=None, ge=1, le=1000)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000, description="another name of steps")
    lora: dict[str, StrictFloat] | None = Field(
        default=None, max_length=16, description="weights by name, of the LoRAs that /v1/models lists"
    )
    user: Text = None
    quality: Text = None
    style: Text = None
    background: Text = None
    moderation: Text = None
    negative_prompt: str | None = Field(
        default=None, max_length=MAX_PROMPT, description=f"of models made for guidance; else {IGNORED}"
    )
    guidance_scale: StrictFloat | StrictInt | Text = Field(
        default=None,
        description=f"a number, of models made for guidance; else {IGNORED}",
        json_schema_extra={"minimum": 0, "maximum": MAX_GUIDANCE},  # of numbers: a text has none
    )
    condition_scale: float | None = Field(default=None, ge=0, le=MAX_SCALE, description="how strongly condition holds")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None and (value != "" or name == "prompt")}

    @field_validator("n", "seed", "steps", "num_inference_steps", "output_compression", "partial_images", mode="before")
    @classmethod
    def _is_no_bool(cls, value: Any) -> Any:
        return str(value) if isinstance(value, bool) else value  # which is no number

    @field_validator("stream", mode="before")
    @classmethod
    def _as_forms_write_it(cls, value: Any) -> Any:
        return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value

    @field_validator("guidance_scale")
    @classmethod
    def _is_a_scale(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not 0 <= value <= MAX_GUIDANCE:  # nor is it NaN
            raise ValueError(f"must be 0 to {MAX_GUIDANCE}")
        return value

    @field_validator("lora", mode="before")
    @classmethod
    def _of_json(cls, value: Any) -> Any:
        """A form's field is a text."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            return value

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and have no meaning here, or none beside the others."""
        known = {name: field.description or "" for name, field in type(self).model_fields.items()}
        found = [name for name, what in known.items() if what.endswith(IGNORED) and getattr(self, name) is not None]
        beside = {
            "num_inference_steps": self.steps is not None and self.num_inference_steps is not None,
            "output_compression": self.output_format in (None, "png") and self.output_compression is not None,
            "partial_images": not self.stream and bool(self.partial_images),
            "response_format": self.stream is True and self.response_format == "url",
        }
        return found + [name for name, has_none in beside.items() if has_none]

    @property
    def drawing(self) -> dict[str, Any]:
        """Of a GenerateRequest."""
        steps, seed = self.steps or self.num_inference_steps, None if self.seed == -1 else self.seed
        return {"prompt": self.prompt, "count": self.n or 1, "steps": steps, "seed": seed, "lora": self.lora}


class GenerationRequest(ImageRequest):
    """The body of /v1/images/generations."""

    condition: str | None = Field(default=None, description="for a ControlNet: PNG, JPEG or WebP in base64")


class EditRequest(ImageRequest):
    """The form of /v1/images/edits; likewise."""

    image: UploadFile | None = Field(default=None, description="PNG, JPEG or WebP; may be absent with a condition")
    condition: UploadFile | None = Field(default=None, description="for a ControlNet: edges, depth or a pose")
    images: list[UploadFile] | None = Field(default=None, alias="image[]", description="the same, as a list of one")
    mask: UploadFile | None = Field(default=None, description="transparent or white is drawn anew")
    strength: float | None = Field(default=None, gt=0, le=1)
    input_fidelity: Text = None

    @field_validator("guidance_scale", mode="before")
    @classmethod
    def _number_of_a_form(cls, value: Any) -> Any:
        """A form's field is a text."""
        try:
            return float(value)
        except (TypeError, ValueError):
            return value


class ImageData(BaseModel):
    """One picture: base64, or where it is."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImageResponse(BaseModel):
    """OpenAI's response; what follows `size` is ours. timings: seconds by stage; warnings: what was not done as asked."""

    created: int
    data: list[ImageData]
    output_format: Format
    size: str
    steps: int
    timings: dict[str, float]
    unknown_words: list[str]
    replaced_words: dict[str, str]
    warnings: list[str]


class GuidanceKnown(BaseModel):
    """default: the scale of a request that says none; range: what the model was made for, as far as its card says; embedded: the
    network is told the scale, and there is no negative prompt."""

    default: float
    range: tuple[float, float] | None
    embedded: bool


class Model(BaseModel):
    """A model as OpenAI lists it, and what it draws. any_size: where it draws more than `sizes`, which sides. vocabulary: the
    words that it knows, in groups, where it lists them. from_pictures: whether it draws from a picture; loras: the names that a
    request may give a weight; condition: whether it reads a conditioning picture; guidance: none of a model that draws without."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "imagine-flash"
    sizes: list[str]
    any_size: AnySize | None = None
    steps: list[int]
    backend: str
    vocabulary: dict[str, list[str]]
    from_pictures: bool
    loras: list[str]
    condition: bool
    guidance: GuidanceKnown | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def size_of(text: str | None) -> Size | None:
    """(height, width) of a size such as 512x768; None for none or auto. Raises RequestError."""
    if text is None or text == "auto":
        return None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not found or not 1 <= min(int(found[1]), int(found[2])) <= max(int(found[1]), int(found[2])) <= MAX_SIDE:
        raise RequestError(
            f"size must be WIDTHxHEIGHT up to {MAX_SIDE}, such as 512x512, or auto, got {text!r}", param="size"
        )
    return int(found[2]), int(found[1])
