"""`/v1/images/generations`, `/v1/images/edits` and `/v1/models`, as the OpenAI API has them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...core.errors import ImagineFlashError, RequestError
from ...folders.manifests import size_name
from ..checks import check_condition
from ..pictures.files import offload
from ..pictures.stored import StoredPictures
from ..request import GenerateRequest
from ..work import GenerateResult
from .drawing import GUIDED, DrawingJob, ImageService, client_of, decoded, warnings_of
from .errors import ErrorBody, error_body, status_of
from .schemas import EditRequest, GenerationRequest, ImageData, ImageRequest, ImageResponse, Model, ModelList, size_of

MultiPartParser.spool_max_size = 2**40  # uploads stay in memory, whose limit is `max_memory`, and never reach a disk
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # with stream
ERRORS: dict[int | str, str] = {
    400: "a value that cannot be drawn",
    401: "no valid key",
    403: "a page of another host",
    404: "no such model",
    408: "the body does not come",
    413: "too large",
    429: "too many wait, or the quota is used up: see Retry-After",
    503: "loading or failing: see Retry-After",
    504: "not in time",
    "4XX": "what else a request may have wrong",
}


def images_router(service: ImageService) -> APIRouter:
    """The routes of one engine."""
    errors = {code: {"description": text, "model": ErrorBody} for code, text in ERRORS.items()}
    locked = [Depends(HTTPBearer(auto_error=False, description="One of the server's keys."))]
    stored = StoredPictures(service.settings.max_memory)
    router = APIRouter(tags=["images"], responses=errors, dependencies=locked if service.settings.api_keys else [])

    @router.post("/v1/images/generations", response_model=ImageResponse, responses=EVENTS)
    async def generations(asked: GenerationRequest, request: Request) -> Response:
        """Draw a prompt; with a ControlNet, under a conditioning picture."""
        _check_model(service, asked.model)
        job = _job(service, asked, client_of(request))
        if asked.condition is not None or asked.condition_scale is not None:
            file = None if asked.condition is None else await decoded(asked.condition, "condition")
            job = await _with_pictures(service, asked, job, {"condition": file})
        return await _answer(service, stored, asked, job, request)

    @router.post("/v1/images/edits", response_model=ImageResponse, responses=EVENTS)
    async def edits(
        asked: Annotated[EditRequest, Form(media_type="multipart/form-data")], request: Request
    ) -> Response:
        """Draw a prompt from a picture, everywhere or where the mask says; with a ControlNet, under a conditioning picture."""
        _check_model(service, asked.model)
        uploads = [*([] if asked.image is None else [asked.image]), *(asked.images or [])]
        if len(uploads) > 1 or (not uploads and asked.condition is None):
            raise RequestError(f"image: exactly one picture is drawn from, got {len(uploads)}", param="image")
        given = {"image": next(iter(uploads), None), "mask": asked.mask, "condition": asked.condition}
        files = {name: None if file is None else await file.read() for name, file in given.items()}
        job = _job(service, asked, client_of(request))
        job = await _with_pictures(service, asked, job, files, strength=asked.strength)
        return await _answer(service, stored, asked, job, request)

    _lookups(router, service, stored)
    return router


def _lookups(router: APIRouter, service: ImageService, stored: StoredPictures) -> None:
    @router.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """The one model that is loaded."""
        return ModelList(data=[_model(service)])

    @router.get("/v1/models/{name:path}", response_model=Model)
    async def one_model(name: str) -> Model:
        """That model, by its name or an alias."""
        _check_model(service, name)
        return _model(service)

    @router.get("/pictures/{name}", include_in_schema=False)
    async def picture(name: str) -> Response:
        """What response_format=url gave the address of."""
        if (file := stored.find(name)) is None:
            raise HTTPException(404, "no such picture; they are kept for an hour")
        return Response(file, media_type=f"image/{name.rpartition('.')[2]}")


def _job(service: ImageService, asked: ImageRequest, client: Any, **further: Any) -> DrawingJob:
    (height, width), scaled = service.size(size_of(asked.size), asked.n or 1)
    values = {**asked.drawing, "height": height, "width": width, "timeout": service.settings.timeout, **further}
    kind, quality = asked.output_format or "png", asked.output_compression
    scale = asked.guidance_scale if isinstance(asked.guidance_scale, (int, float)) else None
    guided = service.guidance(scale, asked.negative_prompt)
    ignored = tuple(name for name in asked.ignored if GUIDED.get(name) not in guided)
    request = GenerateRequest(**values, **guided)
    return DrawingJob(request=request, client=client, size=scaled, kind=kind, quality=quality, ignored=ignored)


async def _with_pictures(
    service: ImageService, asked: ImageRequest, job: DrawingJob, files: dict[str, bytes | None], **further: Any
) -> DrawingJob:
    """The same with uploaded pictures, by the name of the field, each unpacked once all else is known to be drawable."""
    _, size = service.engine.check(job.request)
    if files.get("condition") is not None:
        check_condition(service.engine.manifest)
    with service.reserve(job):  # nothing is unpacked for whoever has no quota left
        pixels = await service.pixels(files, size, job.client)
    further |= {"seed": job.request.seed, "condition_scale": asked.condition_scale}
    return _job(service, asked, job.client, **further, **pixels)


async def _answer(
    service: ImageService, stored: StoredPictures, asked: ImageRequest, job: DrawingJob, request: Request
) -> Response:
    headers = {"x-ignored": ", ".join(job.ignored)} if job.ignored else {}
    if job.size is not None:
        headers["x-drawn-size"] = size_name((job.request.height or 0, job.request.width or 0))
    if asked.stream:
        return await _streamed(service, asked, job, headers)
    result, files = await service.draw(job, request)
    by_url = asked.response_format == "url" or (
        asked.response_format is None and (asked.model or "").startswith("dall-e")
    )

    def body() -> str:
        data = []
        for i, file in enumerate(files):
            if not by_url:
                where = {"b64_json": base64.b64encode(file).decode()}
            elif service.settings.image_urls == "data":
                where = {"url": f"data:image/{job.kind};base64,{base64.b64encode(file).decode()}"}
            else:
                where = {"url": f"{str(request.base_url).rstrip('/')}/pictures/{stored.keep(file, job.kind)}"}
            data.append(ImageData(seed=result.seed + i, **where))
        return _response(result, job, data).model_dump_json(exclude_none=True)

    return Response(await offload(body, sum(map(len, files))), media_type="application/json", headers=headers)


def _response(result: GenerateResult, job: DrawingJob, data: list[ImageData]) -> ImageResponse:
    return ImageResponse(
        created=int(time.time()),
        data=data,
        output_format=job.kind,  # type: ignore[arg-type]
        size=size_name(job.size or (result.images.shape[1], result.images.shape[2])),
        steps=result.steps,
        timings=result.timings.stages(),
        unknown_words=result.unknown_words,
        replaced_words=result.replaced_words,
        warnings=warnings_of(result, job),
    )


async def _streamed(service: ImageService, asked: ImageRequest, job: DrawingJob, headers: dict[str, str]) -> Response:
    """Server-sent events as OpenAI's API has them: the picture in one step, if partial_images is more than 0, then the whole. It
    counts with whichever comes first, and once."""
    drawn: list[GenerateResult] = []
    ends = service.ends()
    with ExitStack() as held:
        held.callback(lambda: drawn and service.drawn(drawn[-1], job.client))
        reserved = held.enter_context(service.reserve(job))
        prepared = await service.prepare(job)
        preview = service.engine.preview(prepared) if asked.partial_images else None
        first = service.start(preview or prepared, job.client)  # refused with a status, as without a stream
        held.callback(first.cancel)
        held = held.pop_all()
    name = "image_edit" if isinstance(asked, EditRequest) else "image_generation"

    async def events() -> AsyncIterator[str]:
        try:
            if preview is not None:
                drawn.append(await asyncio.wrap_future(first))
                reserved.count()  # who has seen it may hang up
                async for event in _pictures(service, drawn[-1], job, f"{name}.partial_image", ends):
                    yield event
            last = first if preview is None else service.start(prepared, job.client)
            drawn.append(await asyncio.wrap_future(last))
            reserved.count()
            async for event in _pictures(service, drawn[-1], job, f"{name}.completed", ends):
                yield event
        except ImagineFlashError as error:
            status, code = status_of(error)
            yield _event("error", error_body(str(error), code=code, status=status, param=error.param))

    return _Events(held, events(), headers={**headers, "x-accel-buffering": "no"})


class _Events(StreamingResponse):
    """What is held for them is let go at their end, also where nobody came to read the first."""

    media_type = "text/event-stream"

    def __init__(self, held: ExitStack, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _pictures(
    service: ImageService, result: GenerateResult, job: DrawingJob, kind: str, ends: float
) -> AsyncIterator[str]:
    found = _response(result, job, []).model_dump(exclude={"data", "created"})

    def event(i: int, file: bytes) -> str:
        number = {"partial_image_index": i} if kind.endswith("partial_image") else {}
        data = {"b64_json": base64.b64encode(file).decode(), "created_at": int(time.time()), "seed": result.seed + i}
        return _event(kind, {**data, **number, **found, "quality": "auto", "background": "opaque"})

    for i, file in enumerate(await service.files(result, job, ends)):
        yield await offload(partial(event, i, file), len(file))


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def _check_model(service: ImageService, name: str | None) -> None:
    """Raises 404 for a model that is not the one loaded; a request may leave it out."""
    if not service.knows(name):
        raise HTTPException(404, f"no model {name!r}; this server has {service.engine.manifest.name!r}")


def _model(service: ImageService) -> Model:
    return Model(id=service.engine.manifest.name, **service.abilities)
