"""What a user asks for. Validated once, at the edge."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, field_validator, model_validator

from ..core.checked import Checked
from ..core.errors import RequestError
from .backends.base import LoraSet
from .editing import DEFAULT_STRENGTH

MAX_COUNT = 64
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 50
MAX_LORA = 20.0  # either way
MAX_SCALE = 10  # of a condition; far beyond it numbers overflow, which would be called the backend's fault
_WAYS_OUT = {
    "prompt": "a text such as 'a fox on a pink background'",
    "steps": "a whole number; the embedded model draws in 1, 2 or 3",
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "height": "a whole number of pixels",
    "width": "a whole number of pixels",
    "count": f"a whole number from 1 to {MAX_COUNT}",
    "timeout": "a number of seconds above 0",
    "guidance": f"a number from 0 to {MAX_GUIDANCE}; 1 is none",
    "negative_prompt": "a text",
    "lora": f"a weight from {-MAX_LORA:g} to {MAX_LORA:g} by name, such as {{'pixel': 0.8}}",
    "image": "uint8 (H, W, 3)",
    "mask": "(H, W) of bool or of numbers from 0 to 1",
    "strength": "a number above 0, at most 1",
    "condition": "uint8 (H, W, 3)",
    "condition_scale": f"a number from 0 to {MAX_SCALE}; 1 is the network's own",
}


class GenerateRequest(Checked):
    """A prompt and how to draw it. Keyword-only, frozen; RequestError in one line for what cannot be drawn.

    steps: network evaluations; None takes the most that the model was distilled for. seed: picture i of a request has the
    noise of seed + i, so any of them can be drawn again alone; None draws a seed at random. count: pictures, 1 to 64.
    height, width: pixels; None takes the engine's first size. timeout: seconds after which the request fails if it is
    still waiting or being drawn; those that expire first are drawn first.

    image: uint8 (H, W, 3), of the request's size, to start from; drawing begins at the step of the plan whose noise level
    is nearest to strength (1: the noisiest; default 0.75, or 1 with a mask). mask: (H, W), bool or 0..1: 1 is drawn anew,
    0 stays as it is in the image, to the bit.

    guidance: how strongly the prompt pulls, diffusers' guidance_scale; 1 and less is none, None takes the model's own.
    negative_prompt: what the picture is drawn away from, where guidance is above 1; None is the empty prompt.

    lora: the LoRAs to draw with, of those that the engine was loaded with, and the weight of each, from -20 to 20; None and
    weights of 0 are none.

    condition: uint8 (H, W, 3), of the request's size, what the model's ControlNet or T2I-adapter reads: edges, depth or a pose,
    already prepared. condition_scale: how strongly it holds, diffusers' controlnet_conditioning_scale and
    adapter_conditioning_scale; 0 is not at all, None is 1.
    """

    model_config = ConfigDict(strict=True)

    prompt: str
    steps: int | None = Field(default=None, ge=1)
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**32), ge=0, le=MAX_SEED)
    count: int = Field(default=1, ge=1, le=MAX_COUNT)
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    image: NDArray[np.uint8] | None = None
    mask: NDArray[np.float32] | None = None
    strength: float | None = Field(default=None, gt=0, le=1)
    guidance: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    negative_prompt: str | None = None
    lora: dict[str, Annotated[float, Field(ge=-MAX_LORA, le=MAX_LORA, allow_inf_nan=False)]] | None = None
    condition: NDArray[np.uint8] | None = None
    condition_scale: float | None = Field(default=None, ge=0, le=MAX_SCALE, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        if values.get("seed", 0) is None:
            del values["seed"]
        super().__init__(**values)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What was asked for: long text is cut, and pictures are their shapes."""
        for name, value in super().__repr_args__():
            if isinstance(value, np.ndarray):
                value = value.shape
            if value is not None:
                yield name, f"{value[:100]}…" if isinstance(value, str) and len(value) > 100 else value

    @classmethod
    def of(cls, request: GenerateRequest | str | None, fields: Mapping[str, Any]) -> GenerateRequest:
        """A request as it is, or of its fields by name, the prompt first or by name too. Raises RequestError for both at once."""
        if request is None:
            return cls(**fields)
        if isinstance(request, str):
            if "prompt" in fields:
                raise RequestError(f"two prompts, {request!r} and {fields['prompt']!r}: give one")
            return cls(prompt=request, **fields)
        if not isinstance(request, GenerateRequest):
            raise RequestError(f"a request is a prompt or a GenerateRequest, got {request!r}")
        if fields:
            raise RequestError(f"a GenerateRequest has its own {', '.join(fields)}: give them to it, or a prompt here")
        return request

    @classmethod
    def one_line(cls, name: str, kind: str, message: str, value: Any) -> str:
        """The field, what it takes, and what was given."""
        if kind == "extra_forbidden":
            return f"a request has no {name!r}; it has {', '.join(cls.model_fields)}"
        if not name:
            return message.removeprefix("Value error, ")
        given = "nothing" if kind == "missing" else repr(value)
        given = _described(value) if name in ("image", "mask", "condition") else given
        return f"{name} must be {_WAYS_OUT.get(name, 'valid')}, got {given}"

    @property
    def noised(self) -> float:
        """How far towards noise drawing begins: its strength, 1 without an image."""
        whole = self.image is None or self.mask is not None
        return self.strength or (1.0 if whole else DEFAULT_STRENGTH)

    @property
    def held(self) -> float:
        """The scale of its condition, 0 without one."""
        known = 1.0 if self.condition_scale is None else self.condition_scale
        return 0.0 if self.condition is None else known

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any) -> Any:
        """NumPy's numbers are numbers."""
        if isinstance(value, dict):
            return {name: cls._plain_numbers(one) for name, one in value.items()}
        return value.item() if isinstance(value, (np.integer, np.floating)) else value

    @property
    def loras(self) -> LoraSet:
        """What `lora` comes to: by name, without weights of 0."""
        return tuple(sorted((name, float(weight)) for name, weight in (self.lora or {}).items() if weight))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerateRequest):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in type(self).model_fields)

    def __hash__(self) -> int:
        return hash((self.prompt, self.steps, self.seed, self.count, self.height, self.width))

    @field_validator("image", "condition", mode="before")
    @classmethod
    def _is_a_picture(cls, image: Any) -> Any:
        if image is None:
            return None
        pixels = _as_array(image).copy()  # the caller may go on drawing into theirs
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError("no picture")
        pixels.setflags(write=False)
        return pixels

    @field_validator("mask", mode="before")
    @classmethod
    def _is_a_mask(cls, mask: Any) -> Any:
        if mask is None:
            return None
        shares = _as_array(mask)
        if shares.dtype.kind not in "bfu" or shares.ndim != 2 or not shares.size:
            raise ValueError("no mask")
        shares = shares.astype(np.float32)  # a copy
        if not (shares.min() >= 0 and shares.max() <= 1):
            raise ValueError("no mask")
        return shares

    @model_validator(mode="after")
    def _has_the_pictures_it_needs(self) -> Self:
        if self.image is None and (self.mask is not None or self.strength is not None):
            raise ValueError("mask and strength need an image to start from")
        if self.condition is None and self.condition_scale is not None:
            raise ValueError("condition_scale needs a condition, the picture that it is the scale of")
        return self

    @model_validator(mode="after")
    def _can_be_drawn_again(self) -> Self:
        if self.seed + self.count - 1 > MAX_SEED:
            most, count = MAX_SEED - self.count + 1, self.count
            raise ValueError(
                f"seed must be at most {most} for {count} pictures, whose seeds follow it, got {self.seed}"
            )
        return self

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("empty")
        return prompt.strip()

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        """Half of a pair, as JSON may hold it, is no character: UnicodeEncodeError is a ValueError."""
        if text is not None:
            text.encode()
        return text


def _as_array(picture: Any) -> NDArray[Any]:
    """Raises ValueError for what is none, such as a tensor on a GPU."""
    try:
        return np.asarray(picture)
    except (TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from None


def _described(picture: Any) -> str:
    try:
        array = _as_array(picture)
    except ValueError as error:
        return f"{type(picture).__name__} ({error})"
    return f"{array.dtype} {array.shape}"
