"""`/v1/stream`: a WebSocket that draws while somebody types. docs/protocol.md has the protocol."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ...core.errors import BusyError, EngineError, ImagineFlashError, RequestError
from ...folders.manifests import Size, size_name
from ..checks import check_condition
from ..pictures.files import FORMATS, encode, offload
from ..request import GenerateRequest
from ..session import Mailbox, Session, SessionResult
from .clients import KEY_PROTOCOL, QuotaError, Reservation, StreamPlaces
from .drawing import LETTER, ImageService, client_of
from .logs import SERVER
from .messages import (
    COMES_A_CONDITION,
    INTERNAL,
    MAX_PICTURE,
    PING,
    PONG,
    PROTOCOL,
    TOO_BIG,
    TRY_AGAIN_LATER,
    StreamRequest,
    failure,
    frame,
)
from .schemas import size_of

LET_FINISH_AFTER = 0.3  # seconds without a picture while somebody types
UPGRADE = {"upgrade": "websocket", "connection": "Upgrade"}
LOG = logging.getLogger(SERVER)


def stream_router(service: ImageService) -> APIRouter:
    """The route of one engine."""
    router = APIRouter()
    places = StreamPlaces[_Connection](service.settings.max_streams)
    ending: set[asyncio.Task[None]] = set()
    service.metrics.sessions.set_function(lambda: len(places))

    @router.get("/v1/stream", include_in_schema=False)
    async def no_stream() -> None:
        """To a client that does not ask for a WebSocket, or whose proxy does not pass it on."""
        raise HTTPException(426, "this is a WebSocket; a proxy on the way must pass the header Upgrade on", UPGRADE)

    @router.websocket("/v1/stream")
    async def stream(socket: WebSocket) -> None:
        offered = [part.strip() for part in socket.headers.get("sec-websocket-protocol", "").split(",")]
        await socket.accept(
            PROTOCOL if PROTOCOL in offered or any(p.startswith(KEY_PROTOCOL) for p in offered) else None
        )
        try:
            connection = _Connection(socket, service)
            lost = places.take(connection, connection.client.name)
        except (EngineError, BusyError) as error:
            await socket.close(TRY_AGAIN_LATER, str(error)[:120])
            return
        if lost is not None:
            ending.add(task := asyncio.create_task(lost.end(places.full)))  # which may not read, and is not waited for
            task.add_done_callback(ending.discard)
        try:
            await connection.run()
        finally:
            places.leave(connection)

    return router


class _Connection:
    """One socket: a session that keeps the newest request, and a writer that sends the newest result."""

    def __init__(self, socket: WebSocket, service: ImageService) -> None:
        self.socket, self.service, self.client = socket, service, client_of(socket)
        self.mailbox = Mailbox()
        self.session = Session(service.engine, self.mailbox.put, let_finish_after=LET_FINISH_AFTER, client=self.client)
        self._files: dict[str, bytes] = {}  # the image to start from, and the condition
        self._pixels: dict[tuple[str, Size], NDArray[np.uint8]] = {}  # of these
        self._next = "image"  # what a file that comes is
        self._counted = (0, 0)  # of the session's replaced and the mailbox's skipped, those that the metrics have
        self._sending = asyncio.Lock()
        self._reserved = Reservation(service.clients, self.client, 0)  # the newest request's one, until it is counted
        self._paid = 0  # the number of the last request that was counted

    async def run(self) -> None:
        writer = asyncio.create_task(self._write())
        try:
            await self._tell(self._hello())
            await self._read()
        except (WebSocketDisconnect, _Disconnected):
            pass
        finally:
            self.session.close()
            self.mailbox.close()
            self._count()
            writer.cancel()
            self._reserved.give_back()

    async def end(self, why: str) -> None:
        """Tells the client to try again later."""
        with suppress(WebSocketDisconnect, RuntimeError):  # it has gone by itself
            await self.socket.close(TRY_AGAIN_LATER, why)

    async def _read(self) -> None:
        while (message := await self.socket.receive())["type"] != "websocket.disconnect":
            text, file = message.get("text"), message.get("bytes") or b""
            most = MAX_PICTURE if text is None else self.service.settings.max_body
            if len(file if text is None else text.encode()) > most:
                return await self.socket.close(TOO_BIG, f"such messages have at most {most} bytes")
            if text is None:
                self._keep(file)
            else:
                await self._take(text)
            self._count()
            await asyncio.sleep(0)  # a flood of messages keeps nobody else waiting

    def _count(self) -> None:
        """What became stale or was skipped since the last time."""
        now = self.session.replaced, self.mailbox.skipped
        self.service.metrics.stale.inc(now[0] - self._counted[0])
        self.service.metrics.skipped.inc(now[1] - self._counted[1])
        self._counted = now

    def _keep(self, file: bytes) -> None:
        """A picture, in the place of the one before of its kind."""
        self._files[self._next] = file
        self._forget(self._next)
        self._next = "image"

    def _forget(self, name: str) -> None:
        """The pixels of a picture."""
        self._pixels = {key: pixels for key, pixels in self._pixels.items() if key[0] != name}

    async def _take(self, text: str) -> None:
        """One message of the client; what is wrong with it is answered, and the socket stays open."""
        seq: object = None
        try:
            raw = json.loads(text)
            if raw == PING:
                return await self._send(PONG)
            if raw == COMES_A_CONDITION:
                self._next = "condition"
                return
            seq = raw.get("seq") if isinstance(raw, dict) else None
            await self._submit(StreamRequest.model_validate(raw))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            message = f"{name}: {first['msg']}" if name else str(first["msg"])
            await self._tell(failure(seq, RequestError(message, param=name or None)))
        except (ValueError, RecursionError) as error:
            ours = error if isinstance(error, ImagineFlashError) else RequestError("the message is no JSON")
            await self._tell(failure(seq, ours))

    async def _submit(self, asked: StreamRequest) -> None:
        """Its picture is reserved, or takes the place of the one before, which is not drawn; only then are those that it needs
        unpacked. Raises RequestError, QuotaError, BusyError."""
        before = self._reserved
        if not before.pictures:
            self._reserved = self.service.clients.reserve(self.client, 1)
        letters = len(asked.prompt) + len(asked.negative_prompt or "")
        try:
            wanted = await self._wanted(asked)
            await offload(
                lambda: self.session.submit(wanted, asked.seq, preview=asked.preview, label=asked), LETTER * letters
            )
        except ImagineFlashError:
            if self._reserved is not before:
                self._reserved.give_back()
            raise

    def _settle(self, found: SessionResult) -> ImagineFlashError | None:
        """Counts a request with its first picture, be it a preview; or says why there is none to be had."""
        if found.result is None:
            if found.seq == self.session.newest:
                self._reserved.give_back()
            return found.error or EngineError("no result")
        if found.seq != self._paid:
            try:
                if not self._reserved.pictures:  # an older one came after all, and was counted
                    self._reserved = self.service.clients.reserve(self.client, 1)
            except QuotaError as error:
                return error
            self._reserved.count()
            self._paid = found.seq
        return None

    async def _wanted(self, asked: StreamRequest) -> GenerateRequest:
        """With the pictures that were sent before. Raises RequestError, BusyError."""
        height, width = size = size_of(asked.size) or self.service.engine.sizes[0]
        drawing = {
            "prompt": asked.prompt,
            "seed": asked.seed or 0,
            "steps": asked.steps,
            "lora": asked.lora,
            "timeout": self.service.settings.timeout,
            **self.service.guidance(asked.guidance_scale, asked.negative_prompt),
        }
        if asked.strength is not None:
            drawing |= {"strength": asked.strength, "image": await self._sent("image", "strength", size)}
        if asked.condition_scale is not None:
            check_condition(self.service.engine.manifest)
            condition = await self._sent("condition", "condition_scale", size)
            drawing |= {"condition_scale": asked.condition_scale, "condition": condition}
        return GenerateRequest(**drawing, height=height, width=width)

    async def _sent(self, name: str, field: str, size: Size) -> NDArray[np.uint8]:
        """The picture that was sent last, of what the field asks for. Raises RequestError, BusyError."""
        if name not in self._files:
            before = f"the text {json.dumps(COMES_A_CONDITION)} and " if name == "condition" else ""
            raise RequestError(
                f"{field} needs a picture: send {before}its file as a binary message before", param=field
            )
        if not self.service.engine.draws(size):
            raise RequestError(
                f"this engine does not draw {size_name(size)}, but {self.service.engine.drawn_sizes}", param="size"
            )
        if (name, size) not in self._pixels:
            given = {name: self._files[name]}
            self._forget(name)  # of any size there may be many
            self._pixels[name, size] = (await self.service.pixels(given, size, self.client))[name]
        return self._pixels[name, size]

    async def _write(self) -> None:
        try:
            async for found in self.mailbox:
                await self._hand_over(found)
                del found  # not kept until the next one comes
        except _Disconnected:
            pass
        except Exception:
            LOG.exception("a stream failed")
            await self.socket.close(INTERNAL)

    async def _hand_over(self, found: SessionResult) -> None:
        """Sends a picture, or why there is none. Raises _Disconnected."""
        if (error := self._settle(found)) is not None:
            return await self._tell(failure(found.seq, error))
        asked, result = found.label, found.result
        assert isinstance(asked, StreamRequest) and result is not None
        pixels = result.images[0]
        data = await offload(lambda: encode(pixels, asked.format), pixels.nbytes)
        self.service.drawn(result, self.client)
        ignored = self.service.ignored(asked.guidance_scale, asked.negative_prompt)
        await self._send(frame(found, result, data, {"format": asked.format, "ignored": ignored}))

    async def _tell(self, message: dict[str, Any]) -> None:
        await self._send(json.dumps(message))

    async def _send(self, message: str | bytes) -> None:
        """One message at a time. Raises _Disconnected where nobody is there any more."""
        async with self._sending:
            try:
                await (self.socket.send_text(message) if isinstance(message, str) else self.socket.send_bytes(message))
            except (WebSocketDisconnect, RuntimeError):  # starlette raises either
                raise _Disconnected from None

    def _hello(self) -> dict[str, Any]:
        model, formats = self.service.engine.manifest.name, list(FORMATS)
        return {"type": "ready", "model": model, "formats": formats, **self.service.abilities}


class _Disconnected(Exception):
    """The client has closed the socket."""
