"""`/v1/images/generations`, `/v1/images/edits` and `/v1/models`, as the OpenAI API has them."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Form, Request, Response, UploadFile
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ...core.errors import RequestError
from ...folders.manifests import Size, size_name
from ..request import MAX_COUNT, MAX_SEED, GenerateRequest
from ..work import GenerateResult
from .errors import ErrorBody
from .metrics import Metrics
from .pictures import Format, Unpacking, beside, encode_all, read_image, read_mask
from .settings import ServerSettings

if TYPE_CHECKING:
    from .app import Holder

Ignored = Annotated[str | None, Field(max_length=200, description="taken and ignored")]  # what OpenAI has beside
MAX_PROMPT = 4000  # characters; the model's own limit, in tokens, is lower


class ImageRequest(BaseModel):
    """The body of /v1/images/generations: OpenAI's fields, then ours. Fields of OpenAI that have no meaning here are taken
    and ignored, unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = Field(default=None, max_length=200)
    n: int = Field(default=1, ge=1, le=MAX_COUNT)
    size: str | None = Field(default=None, max_length=20, description="WIDTHxHEIGHT or auto")
    response_format: Literal["b64_json"] | None = None
    output_format: Format = "png"
    user: Ignored = None
    quality: Ignored = None
    style: Ignored = None
    background: Ignored = None
    moderation: Ignored = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=1000)


class EditRequest(ImageRequest):
    """The form of /v1/images/edits; likewise."""

    image: UploadFile | None = Field(default=None, description="PNG, JPEG or WebP")
    images: list[UploadFile] | None = Field(default=None, alias="image[]", description="the same, as a list of one")
    mask: UploadFile | None = Field(default=None, description="transparent or white is drawn anew")
    strength: float | None = Field(default=None, gt=0, le=1)
    input_fidelity: Ignored = None


class ImageData(BaseModel):
    """One picture, base64."""

    b64_json: str
    seed: int


class ImageResponse(BaseModel):
    """OpenAI's response; steps, timings (seconds by stage), unknown_words and replaced_words are ours."""

    created: int
    data: list[ImageData]
    output_format: Format
    size: str
    steps: int
    timings: dict[str, float]
    unknown_words: list[str]
    replaced_words: dict[str, str]


class Model(BaseModel):
    """A model as OpenAI lists it, and what it draws."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "imagine-flash"
    sizes: list[str]
    steps: list[int]
    backend: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def images_router(holder: Holder, settings: ServerSettings, metrics: Metrics) -> APIRouter:
    """The routes of one engine."""
    errors = {code: {"description": text, "model": ErrorBody} for code, text in ERRORS.items()}
    asked = [Depends(HTTPBearer(auto_error=False, description="One of the server's keys."))]
    reader = Unpacking()
    router = APIRouter(tags=["images"], responses=errors, dependencies=asked if settings.api_keys else [])

    @router.post("/v1/images/generations", response_model=ImageResponse)
    async def generations(asked: ImageRequest, request: Request) -> Response:
        """Draw a prompt."""
        check_model(holder, asked.model)
        return await _draw(GenerateRequest(**_values(asked, settings)), asked.output_format, request)

    @router.post("/v1/images/edits", response_model=ImageResponse)
    async def edits(
        asked: Annotated[EditRequest, Form(media_type="multipart/form-data")], request: Request
    ) -> Response:
        """Draw a prompt from a picture, everywhere or where the mask says."""
        check_model(holder, asked.model)
        uploads = [*([] if asked.image is None else [asked.image]), *(asked.images or [])]
        if len(uploads) != 1:
            raise RequestError(f"image: exactly one picture is drawn from, got {len(uploads)}", param="image")
        values = _values(asked, settings)
        _, target = holder.get().check(GenerateRequest(**values))
        masked = None if asked.mask is None else asked.mask.file
        pixels = await reader.run(lambda: _read(uploads[0].file, masked, target, settings.max_pixels))
        wanted = GenerateRequest(**values, **pixels, strength=asked.strength)
        return await _draw(wanted, asked.output_format, request)

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """The one model that is loaded."""
        return ModelList(data=[_model(holder)])

    @router.get("/v1/models/{name}", response_model=Model)
    async def one_model(name: str) -> Model:
        """That model, by its name."""
        check_model(holder, name)
        return _model(holder)

    async def _draw(wanted: GenerateRequest, kind: Format, request: Request) -> Response:
        engine = holder.get()
        _, (height, width) = engine.check(wanted)
        pixels = 3 * height * width * wanted.count
        prepared = await beside(lambda: engine.prepare(wanted), pixels)
        result = await _until_gone(asyncio.wrap_future(engine.start(prepared)), request)
        metrics.observe(result)
        body = await beside(
            lambda: _response(result, kind).model_dump_json(), pixels
        )  # the largest was 2 seconds' work
        return Response(body, media_type="application/json")

    return router


ERRORS: dict[int | str, str] = {
    400: "a value that cannot be drawn",
    401: "no valid key",
    403: "a page of another host",
    404: "no such model",
    413: "too large",
    429: "too many wait: see Retry-After",
    503: "loading or failing: see Retry-After",
    504: "not in time",
    "4XX": "what else a request may have wrong",
}


def _values(asked: ImageRequest, settings: ServerSettings) -> dict[str, Any]:
    """Of a GenerateRequest."""
    values = {"prompt": asked.prompt, "count": asked.n, "steps": asked.steps, "seed": asked.seed}
    return {**values, **sides(asked.size), "timeout": settings.timeout}


def sides(size: str | None) -> dict[str, int]:
    """{"width": ..., "height": ...} of a size such as 512x768. Raises RequestError."""
    if size is None or size == "auto":
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not found:
        raise RequestError(f"size must be WIDTHxHEIGHT such as 512x512, or auto, got {size!r}", param="size")
    return {"width": int(found[1]), "height": int(found[2])}


def check_model(holder: Holder, name: str | None) -> None:
    """Raises 404 for a model that is not the one loaded; a request may leave it out."""
    loaded = holder.get().manifest.name
    if name is not None and name != loaded:
        raise HTTPException(404, f"no model {name!r}; this server has {loaded!r}")


async def _until_gone(drawing: asyncio.Future[GenerateResult], request: Request) -> GenerateResult:
    """The result; a client that hangs up cancels the work."""
    gone = asyncio.ensure_future(_disconnected(request))
    gone.add_done_callback(lambda _: drawing.cancel())
    try:
        return await drawing
    except asyncio.CancelledError:
        if not drawing.cancelled() or not gone.done():
            raise  # the server's own end
        raise HTTPException(499, "the client hung up") from None
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _read(image: BinaryIO, mask: BinaryIO | None, size: Size, max_pixels: int) -> dict[str, Any]:
    found = {"image": read_image(image.read(), size, max_pixels=max_pixels)}
    return found if mask is None else {**found, "mask": read_mask(mask.read(), size, max_pixels=max_pixels)}


def _response(result: GenerateResult, kind: Format) -> ImageResponse:
    height, width = result.images.shape[1:3]
    files = encode_all(result.images, kind)
    data = [ImageData(b64_json=base64.b64encode(file).decode(), seed=result.seed + i) for i, file in enumerate(files)]
    return ImageResponse(
        created=int(time.time()),
        data=data,
        output_format=kind,
        size=size_name((height, width)),
        steps=result.steps,
        timings=result.timings.stages(),
        unknown_words=result.unknown_words,
        replaced_words=result.replaced_words,
    )


def _model(holder: Holder) -> Model:
    engine = holder.get()
    return Model(
        id=engine.manifest.name,
        sizes=[size_name(size) for size in engine.sizes],
        steps=engine.steps,
        backend=engine.backend.describe(),
    )
