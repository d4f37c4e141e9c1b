"""What goes over the WebSocket of `/v1/stream`, either way. docs/protocol.md has the protocol."""

from __future__ import annotations

import json
import struct
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...core.errors import ImagineFlashError
from ...folders.manifests import size_name
from ..pictures.files import Format
from ..request import MAX_GUIDANCE, MAX_SCALE, MAX_SEED
from ..session import SessionResult
from ..work import GenerateResult
from .errors import error_body, status_of
from .schemas import MAX_PROMPT

PROTOCOL = "imagine-flash"
MAX_SEQ = 2**53 - 1  # what JavaScript counts exactly
MAX_PICTURE = 2**18  # bytes of a file
TRY_AGAIN_LATER, TOO_BIG, INTERNAL = 1013, 1009, 1011
COMES_A_CONDITION = {"type": "condition"}  # said before the file of a conditioning picture
PING, PONG = {"type": "ping"}, '{"type":"pong"}'  # of pages, which cannot send a WebSocket's own


class StreamRequest(BaseModel):
    """One message of the client: its newest text, and how to draw it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seq: int = Field(ge=1, le=MAX_SEQ)
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=1000)
    size: str | None = Field(default=None, max_length=20)
    format: Format = "jpeg"  # WebP takes several times as long to write: decision 025
    preview: bool = False
    lora: dict[str, float] | None = Field(default=None, max_length=16)
    guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT)
    strength: float | None = Field(default=None, gt=0, le=1)  # drawn from the picture that was sent last
    condition_scale: float | None = Field(default=None, ge=0, le=MAX_SCALE)  # under the condition that was sent last


def frame(found: SessionResult, result: GenerateResult, data: bytes, more: dict[str, Any]) -> bytes:
    """4 bytes, big-endian: the length of a JSON header; the header, with what `more` says; the picture's file."""
    height, width = result.images.shape[1:3]
    header = {
        "type": "image",
        "seq": found.seq,
        "preview": found.preview,
        "seed": result.seed,
        "steps": result.steps,
        "size": size_name((height, width)),
        "bytes": len(data),
        "cached": result.cached,
        "unknown_words": result.unknown_words,
        "replaced_words": result.replaced_words,
        "cut": result.cut,
        "cut_negative": result.cut_negative,
        "timings": result.timings.stages(),
        **more,
    }
    encoded = json.dumps(header).encode()
    return struct.pack(">I", len(encoded)) + encoded + data


def failure(seq: object, error: ImagineFlashError) -> dict[str, Any]:
    """What is wrong with the request of that number, None where it has none."""
    status, code = status_of(error)
    known = seq if isinstance(seq, int) and not isinstance(seq, bool) else None
    return {"type": "error", "seq": known, **error_body(str(error), code=code, status=status, param=error.param)}
