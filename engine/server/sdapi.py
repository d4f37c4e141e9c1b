"""`/sdapi/v1/...`: the door that clients of AUTOMATIC1111's and Forge's web interfaces know, as far as they need it."""

from __future__ import annotations

import base64
import json
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from starlette.exceptions import HTTPException

from ..request import MAX_COUNT, MAX_SEED, GenerateRequest
from ..work import GenerateResult
from .drawing import Studio, Wish, client_of, decoded, warnings_of
from .schemas import MAX_PROMPT, MAX_SIDE

SAMPLER = "the model's own"
LEAST_STRENGTH = 0.01  # theirs may be 0


class TextRequest(BaseModel):
    """The body of txt2img. Null is as if it was not there; the many fields that have no meaning here are taken, and named in the
    header x-ignored where they are not empty. steps: of the model's numbers the nearest."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(default="", max_length=MAX_PROMPT)
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT)
    seed: int = Field(default=-1, ge=-1, le=MAX_SEED)
    steps: int = Field(default=50, ge=1, le=1000)
    cfg_scale: float = Field(default=7.0, ge=0, le=50)
    width: int = Field(default=512, ge=1, le=MAX_SIDE)
    height: int = Field(default=512, ge=1, le=MAX_SIDE)
    batch_size: int = Field(default=1, ge=1, le=MAX_COUNT)
    n_iter: int = Field(default=1, ge=1, le=MAX_COUNT)
    send_images: StrictBool = True

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @property
    def ignored(self) -> list[str]:
        given = (name[:40] for name, value in (self.model_extra or {}).items() if value)
        return [name for name in given if name.isascii() and name.isidentifier()][:100]  # what a header can hold


class ImageRequest(TextRequest):
    """The body of img2img: pictures in base64, or as data: URLs."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    inpainting_mask_invert: int = Field(default=0, ge=0, le=1)
    denoising_strength: float = Field(default=0.75, ge=0, le=1)


def sdapi_router(studio: Studio) -> APIRouter:
    """The routes of one engine."""
    router = APIRouter(prefix="/sdapi/v1", include_in_schema=False)  # /docs is about one API

    @router.post("/txt2img")
    async def txt2img(asked: TextRequest, request: Request) -> Response:
        """Text to image."""
        return await _answer(studio, asked, request, {})

    @router.post("/img2img")
    async def img2img(asked: ImageRequest, request: Request) -> Response:
        """Image to image; with a mask, its white part is drawn anew."""
        size, _ = studio.size((asked.height, asked.width), asked.batch_size * asked.n_iter)
        pixels: dict[str, Any] = {
            "image": await studio.uploads.image(decoded(asked.init_images[0], "init_images"), size)
        }
        if asked.mask is not None:
            mask = await studio.uploads.mask(decoded(asked.mask, "mask"), size)
            pixels["mask"] = 1 - mask if asked.inpainting_mask_invert else mask
        return await _answer(
            studio, asked, request, {**pixels, "strength": max(LEAST_STRENGTH, asked.denoising_strength)}
        )

    _lookups(router, studio)
    return router


def _lookups(router: APIRouter, studio: Studio) -> None:
    @router.get("/progress")
    async def progress() -> dict[str, Any]:
        """Whether anything is being drawn: few steps are over before anybody has asked how many are left."""
        waiting = studio.engine.stats().waiting
        state = {"skipped": False, "interrupted": False, "job": "", "job_count": waiting, "job_no": 0}
        state |= {"sampling_step": 0, "sampling_steps": 0}
        return {"progress": 0.01 if waiting else 0.0, "eta_relative": 0.0, "state": state, "current_image": None}

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """The model, as clients look it up."""
        return {"sd_model_checkpoint": studio.engine.manifest.name, "samples_format": "png"}

    @router.post("/options")
    async def choose(given: dict[str, Any]) -> None:
        """There is one model: 404 for another; other options change nothing."""
        if (name := given.get("sd_model_checkpoint")) not in (None, "") and not studio.knows(str(name)):
            raise HTTPException(404, f"no model {str(name)[:100]!r}; this server has {studio.engine.manifest.name!r}")

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The one model."""
        name = studio.engine.manifest.name
        return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """One: a distilled model is drawn as it was distilled."""
        return [{"name": SAMPLER, "aliases": [], "options": {}}]


async def _answer(studio: Studio, asked: TextRequest, request: Request, start: dict[str, Any]) -> Response:
    count = asked.batch_size * asked.n_iter
    (height, width), scaled = studio.size((asked.height, asked.width), count)
    drawing: dict[str, Any] = {
        "prompt": asked.prompt,
        "seed": None if asked.seed == -1 else asked.seed,
        "steps": min(studio.engine.steps, key=lambda known: (abs(known - asked.steps), -known)),
        "count": count,
        "height": height,
        "width": width,
        "timeout": studio.settings.timeout,
    }
    drawing |= studio.guidance(asked.cfg_scale, asked.negative_prompt) | start
    wish = Wish(request=GenerateRequest(**drawing), client=client_of(request), size=scaled)
    result = await studio.draw(wish, request)
    files = await studio.files(result, wish) if asked.send_images else []
    body = {
        "images": [base64.b64encode(file).decode() for file in files],
        "parameters": asked.model_dump(exclude={"init_images", "mask"}),
        "info": json.dumps(_info(asked, result, wish)),
    }
    ignored = {"x-ignored": ", ".join(asked.ignored)} if asked.ignored else {}
    return Response(json.dumps(body), media_type="application/json", headers=ignored)


def _info(asked: TextRequest, result: GenerateResult, wish: Wish) -> dict[str, Any]:
    """What drew the pictures, by their names."""
    count, (height, width) = len(result.images), wish.size or result.images.shape[1:3]
    texts = [
        f"{result.prompt}\nSteps: {result.steps}, Seed: {result.seed + i}, Size: {width}x{height}" for i in range(count)
    ]
    return {
        "prompt": result.prompt,
        "all_prompts": [result.prompt] * count,
        "negative_prompt": asked.negative_prompt,
        "seed": result.seed,
        "all_seeds": [result.seed + i for i in range(count)],
        "width": width,
        "height": height,
        "steps": result.steps,
        "cfg_scale": result.guidance,
        "batch_size": asked.batch_size,
        "sampler_name": SAMPLER,
        "infotexts": texts,
        "warnings": warnings_of(result, wish),
    }
