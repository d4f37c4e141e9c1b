"""From what a client asks for to files of pictures: the part that all APIs of the server share."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from ...core.errors import ExpiredError, RequestError
from ...folders.sizes import Size, size_name
from ..engine import Engine
from ..pictures.files import Turns, encode, offload, resize
from ..pictures.uploads import UploadReader
from ..request import GenerateRequest
from ..work import Drawing, GenerateResult, Prepared
from .clients import Clients, KnownClient, Reservation
from .metrics import Metrics
from .model import ServedModel
from .schemas import OPENAI_MODELS
from .settings import ServerSettings

GUIDED = {
    "guidance_scale": "guidance",
    "negative_prompt": "negative_prompt",
}  # fields of clients, and of a GenerateRequest
LETTER = 50  # bytes of pixels that take as long as a letter of a text: one of 2,000 is read beside the event loop
BASE64_SLICE = 4 * 65_536  # letters that are decoded at once
MOST_SCALED = 2**25  # pixels of one answer that are not the model's own


@dataclass(frozen=True, kw_only=True)
class DrawingJob:
    """What is to be drawn, and how it is handed over. size: of the pictures, where it is not what the model draws; ignored: fields
    of the request that have no meaning here."""

    request: GenerateRequest
    client: KnownClient
    size: Size | None = None
    kind: str = "png"
    quality: int | None = None
    ignored: tuple[str, ...] = ()


class ImageService:
    """What the routes draw with."""

    def __init__(self, model: ServedModel, settings: ServerSettings, clients: Clients, metrics: Metrics) -> None:
        self.model, self.settings, self.clients, self.metrics = model, settings, clients, metrics
        self.uploads = UploadReader(settings.max_pixels)
        self._turns = Turns()  # of writing files

    @property
    def engine(self) -> Engine:
        """Raises EngineError while there is none."""
        return self.model.engine

    @property
    def vocabulary(self) -> dict[str, list[str]]:
        """What the model can draw, in groups of words; empty for one that knows every word."""
        words = sorted(word for word in self.engine.tokenizer.known_words if word.isalnum())
        return self.engine.manifest.vocabulary or ({"words": words} if words else {})

    @property
    def abilities(self) -> dict[str, Any]:
        """What may be asked of the model, as clients are told it. condition: whether it reads a conditioning picture; guidance: the
        scale of requests that say none and the range that it was made for, none where it draws without."""
        engine, known = self.engine, self.engine.manifest.guidance
        return {
            "sizes": [size_name(size) for size in engine.sizes],
            "any_size": engine.any_size and engine.any_size.model_dump(),
            "steps": engine.steps,
            "backend": engine.backend.describe(),
            "vocabulary": self.vocabulary,
            "from_pictures": engine.draws_from_pictures,
            "loras": engine.loras,
            "condition": engine.manifest.control is not None,
            "guidance": known.model_dump(include={"default", "range", "embedded"}) if self._is_guided else None,
        }

    @property
    def _is_guided(self) -> bool:
        """Whether it was made for guidance, and can be given it here."""
        known = self.engine.manifest.guidance
        return max(known.default, *(known.range or (1,))) > 1 and (self.engine.route == "stages" or known.embedded)

    def knows(self, name: str | None) -> bool:
        """Whether a request for the model of that name is answered here."""
        return name in (None, self.engine.manifest.name, *self.settings.alias) or bool(
            OPENAI_MODELS.fullmatch(name or "")
        )

    def size(self, asked: Size | None, count: int) -> tuple[Size, Size | None]:
        """The size to draw, and the one to scale to: of the model's sizes the one whose shape is nearest, the largest of them; of
        any size, the nearest. Raises RequestError."""
        sizes, free = self.engine.sizes, self.engine.any_size
        if asked is None or self.engine.draws(asked):
            return asked or sizes[0], None
        if asked[0] * asked[1] * count > MOST_SCALED:
            raise RequestError(f"{count} pictures of {size_name(asked)} are too much at once; ask for fewer", param="n")
        if free is not None:
            return free.nearest(asked), asked
        shape = np.log(asked[0] / asked[1])
        return min(
            sizes, key=lambda size: (round(abs(np.log(size[0] / size[1]) - shape), 3), -size[0] * size[1])
        ), asked

    def guidance(self, scale: float | None, negative: str | None) -> dict[str, Any]:
        """Of a GenerateRequest, what of them this model takes: one that draws without guidance takes neither."""
        known = self.engine.manifest.guidance
        if not self._is_guided:
            return {}
        taken: dict[str, Any] = {} if scale is None else {"guidance": float(scale)}
        weighs = not known.embedded and (known.default if scale is None else scale) > 1
        return taken | ({"negative_prompt": negative} if negative and weighs else {})

    def ignored(self, scale: float | None, negative: str | None) -> list[str]:
        """The fields of these that say something and that this model does not take."""
        given, taken = (
            {"guidance_scale": scale is not None, "negative_prompt": bool(negative)},
            self.guidance(scale, negative),
        )
        return [name for name, field in GUIDED.items() if given[name] and field not in taken]

    async def pixels(self, files: Mapping[str, bytes | None], size: Size, client: KnownClient) -> dict[str, Any]:
        """The image, mask and condition of a GenerateRequest, of what was uploaded. Raises RequestError, BusyError."""
        read = {"image": self.uploads.image, "mask": self.uploads.mask, "condition": self.uploads.condition}
        given = {name: file for name, file in files.items() if file is not None}
        return {name: await read[name](file, size, client.name) for name, file in given.items()}

    async def prepare(self, job: DrawingJob) -> Prepared:
        """A request made ready. Raises RequestError, PlanError."""
        asked = job.request
        _, size = self.engine.check(asked)
        letters = len(asked.prompt) + len(asked.negative_prompt or "")
        work = 3 * size[0] * size[1] * asked.count + LETTER * letters
        return await offload(lambda: self.engine.prepare(asked), work)

    def reserve(self, job: DrawingJob) -> Reservation:
        """What its client's quota holds of it. Raises QuotaError, RequestError."""
        return self.clients.reserve(job.client, job.request.count)

    def start(self, prepared: Prepared, client: KnownClient) -> Drawing:
        """Raises BusyError."""
        return self.engine.start(prepared, client=client)

    async def draw(
        self, job: DrawingJob, request: Request, *, files: bool = True
    ) -> tuple[GenerateResult, list[bytes]]:
        """Its pictures, and them as files, unless nobody wants these; a client that hangs up cancels the work. Raises
        ExpiredError."""
        with self.reserve(job) as reserved:
            working = asyncio.ensure_future(self._draw(job, reserved, files))
            gone = asyncio.ensure_future(_disconnected(request))
            gone.add_done_callback(lambda _: working.cancel())
            try:
                return await working
            except asyncio.CancelledError:
                if not working.cancelled() or not gone.done():
                    raise  # the server's own end
                raise HTTPException(499, "the client hung up") from None
            finally:
                gone.cancel()

    async def _draw(self, job: DrawingJob, reserved: Reservation, files: bool) -> tuple[GenerateResult, list[bytes]]:
        ends = self.ends()
        result = await asyncio.wrap_future(self.start(await self.prepare(job), job.client))
        reserved.count()
        self.drawn(result, job.client)
        return result, await self.files(result, job, ends) if files else []

    def ends(self) -> float:
        """When a request that begins now must be answered, by the event loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.timeout

    def drawn(self, result: GenerateResult, client: KnownClient) -> GenerateResult:
        """Notes it in the metrics, and for those who wait."""
        self.metrics.observe(result, client.label)
        self.model.line.drawn(result)
        return result

    async def files(self, result: GenerateResult, job: DrawingJob, ends: float) -> list[bytes]:
        """The pictures as files of the kind and size that were asked for. Raises ExpiredError for those not written at `ends`."""
        pixels: NDArray[np.uint8] = result.images
        sized = (one if job.size is None else resize(one, job.size) for one in pixels)
        files = (encode(one, job.kind, job.quality) for one in sized)
        size = pixels.nbytes if job.size is None else 3 * job.size[0] * job.size[1] * len(pixels)
        try:
            async with asyncio.timeout_at(ends):
                return await self._turns.offload(job.client.name, files, size)
        except TimeoutError:
            raise ExpiredError(f"not drawn within its {self.settings.timeout:g} s; try again later") from None


def warnings_of(result: GenerateResult, job: DrawingJob) -> list[str]:
    """What was not done as asked, a sentence each."""
    found = [f"{name} has no meaning here" for name in job.ignored]
    if job.size is not None:
        found.append(
            f"drawn at {size_name((result.images.shape[1], result.images.shape[2]))} and scaled to {size_name(job.size)}"
        )
    for name, cut in (("prompt", result.cut), ("negative prompt", result.cut_negative)):
        if cut:
            found.append(f"the {name} is longer than this model reads; left out: {cut[:200]}")
    return found


def client_of(request: Any) -> KnownClient:
    """Who sends it, as the access check found."""
    return request.scope.get("state", {}).get("client") or KnownClient("")


async def decoded(text: str, name: str) -> bytes:
    """The file of a picture in base64, or in a data: URL. Raises RequestError."""
    try:
        return await offload(partial(_decode, text), len(text))
    except (binascii.Error, ValueError):
        raise RequestError(f"{name}: send a picture in base64", param=name) from None


def _decode(text: str) -> bytes:
    """In slices, between which other threads have their turn. Raises ValueError."""
    begin = (text.find(",") + 1 or len(text)) if text.startswith("data:") else 0
    if (len(text) - begin) % 4 or text.find("=", begin, len(text) - 2) >= 0:
        raise ValueError("padding is at the very end, to four letters")  # which the end of a slice would hide
    slices = (text[at : at + BASE64_SLICE] for at in range(begin, len(text), BASE64_SLICE))
    return b"".join(base64.b64decode(letters, validate=True) for letters in slices)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
