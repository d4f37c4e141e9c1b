"""`/sdapi/v1/...`: the API that clients of AUTOMATIC1111's and Forge's web interfaces know, as far as they need it."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from starlette.exceptions import HTTPException

from ...core.errors import RequestError
from ..pictures.files import offload
from ..request import MAX_COUNT, MAX_GUIDANCE, MAX_SEED, GenerateRequest
from ..work import GenerateResult
from .drawing import DrawingJob, ImageService, client_of, decoded, warnings_of
from .schemas import MAX_PROMPT, MAX_SIDE

SAMPLER = "the model's own"
LORA_TAG = re.compile(r"<lora:([^<>]*)>")
LEAST_STRENGTH = 0.01  # theirs may be 0


class TextRequest(BaseModel):
    """The body of txt2img. Null is as if it was not there; the many fields that have no meaning here are taken, and named in the
    header x-ignored where they are not empty. steps: of the model's numbers the nearest."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(default="", max_length=MAX_PROMPT)
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT)
    seed: int = Field(default=-1, ge=-1, le=MAX_SEED)
    steps: int = Field(default=50, ge=1, le=1000)
    cfg_scale: float = Field(default=7.0, ge=0, le=MAX_GUIDANCE)
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
    def count(self) -> int:
        """Raises RequestError."""
        if (count := self.batch_size * self.n_iter) > MAX_COUNT:
            raise RequestError(f"n_iter: at most {MAX_COUNT} pictures with batch_size, got {count}", param="n_iter")
        return count

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


def sdapi_router(service: ImageService) -> APIRouter:
    """The routes of one engine."""
    router = APIRouter(prefix="/sdapi/v1", include_in_schema=False)  # /docs is about one API

    @router.post("/txt2img")
    async def txt2img(asked: TextRequest, request: Request) -> Response:
        """Text to image."""
        return await _answer(service, asked, request, {})

    @router.post("/img2img")
    async def img2img(asked: ImageRequest, request: Request) -> Response:
        """Image to image; with a mask, its white part is drawn anew."""
        size, _ = service.size((asked.height, asked.width), asked.count)
        mask = await decoded(asked.mask, "mask") if asked.mask else None
        files = {"image": await decoded(asked.init_images[0], "init_images"), "mask": mask}
        with service.clients.reserve(client_of(request), asked.count):
            start = await service.pixels(files, size, client_of(request))
        if mask is not None and asked.inpainting_mask_invert:
            start["mask"] = 1 - start["mask"]
        return await _answer(
            service, asked, request, {**start, "strength": max(LEAST_STRENGTH, asked.denoising_strength)}
        )

    _lookups(router, service)
    return router


def _lookups(router: APIRouter, service: ImageService) -> None:
    @router.get("/progress")
    async def progress() -> dict[str, Any]:
        """Whether anything is being drawn: few steps are over before anybody has asked how many are left."""
        waiting = service.engine.stats().waiting
        state = {"skipped": False, "interrupted": False, "job": "", "job_count": waiting, "job_no": 0}
        state |= {"sampling_step": 0, "sampling_steps": 0}
        return {"progress": 0.01 if waiting else 0.0, "eta_relative": 0.0, "state": state, "current_image": None}

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """The model, as clients look it up."""
        return {"sd_model_checkpoint": service.engine.manifest.name, "samples_format": "png"}

    @router.post("/options")
    async def choose(given: dict[str, Any]) -> None:
        """There is one model: 404 for another; other options change nothing."""
        if (name := given.get("sd_model_checkpoint")) not in (None, "") and not service.knows(str(name)):
            raise HTTPException(404, f"no model {str(name)[:100]!r}; this server has {service.engine.manifest.name!r}")

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The one model."""
        name = service.engine.manifest.name
        return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """Those that a prompt may name."""
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.engine.loras]

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """One: a distilled model is drawn as it was distilled."""
        return [{"name": SAMPLER, "aliases": [], "options": {}}]


def prompt_and_loras(text: str) -> tuple[str, dict[str, float]]:
    """A prompt without its <lora:NAME:WEIGHT>, and these; without a weight it is 1. Raises RequestError."""
    found: dict[str, float] = {}
    for tag in LORA_TAG.findall(text):
        name, *weights = tag.split(":")
        if len(weights) > 1:
            raise RequestError(
                f"prompt: <lora:{tag[:100]}> has more than one weight; networks share it here", param="prompt"
            )
        if name in found:
            raise RequestError(f"prompt: the LoRA {name[:100]!r} is asked for twice", param="prompt")
        try:
            found[name] = float(weights[0]) if weights else 1.0
        except ValueError:
            raise RequestError(f"prompt: <lora:{tag[:100]}> has no number as its weight", param="prompt") from None
    return " ".join(LORA_TAG.sub(" ", text).split()) if found else text, found


async def _answer(service: ImageService, asked: TextRequest, request: Request, start: dict[str, Any]) -> Response:
    prompt, loras = prompt_and_loras(asked.prompt)
    (height, width), scaled = service.size((asked.height, asked.width), asked.count)
    drawing: dict[str, Any] = {
        "prompt": prompt,
        "lora": loras,
        "seed": None if asked.seed == -1 else asked.seed,
        "steps": min(service.engine.steps, key=lambda known: (abs(known - asked.steps), -known)),
        "count": asked.count,
        "height": height,
        "width": width,
        "timeout": service.settings.timeout,
    }
    drawing |= service.guidance(asked.cfg_scale, asked.negative_prompt) | start
    job = DrawingJob(request=GenerateRequest(**drawing), client=client_of(request), size=scaled)
    result, files = await service.draw(job, request, files=asked.send_images)

    def body() -> str:
        images = [base64.b64encode(file).decode() for file in files]
        parameters = asked.model_dump(exclude={"init_images", "mask", *(asked.model_extra or ())})
        return json.dumps({"images": images, "parameters": parameters, "info": json.dumps(_info(asked, result, job))})

    ignored = {"x-ignored": ", ".join(asked.ignored)} if asked.ignored else {}
    return Response(await offload(body, sum(map(len, files))), media_type="application/json", headers=ignored)


def _info(asked: TextRequest, result: GenerateResult, job: DrawingJob) -> dict[str, Any]:
    """What drew the pictures, by their names."""
    count, (height, width) = len(result.images), job.size or result.images.shape[1:3]
    texts = [
        f"{result.asked}\nSteps: {result.steps}, Seed: {result.seed + i}, Size: {width}x{height}" for i in range(count)
    ]
    return {
        "prompt": result.asked,
        "all_prompts": [result.asked] * count,
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
        "warnings": warnings_of(result, job),
    }
