"""The application as a function of the engine: `create_app(engine)`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from ...core.errors import EngineError, ImagineFlashError, LoadingError, missing_extra
from ..engine import Engine
from ..request import GenerateRequest
from .settings import ServerSettings

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
    from fastapi.staticfiles import StaticFiles
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
except ImportError as missing:
    raise missing_extra(missing.name or "fastapi", "serve") from None

from .errors import error_body, one_line, status_of
from .guard import SAFE, Guard
from .images import images_router
from .logs import SERVER
from .metrics import Metrics
from .stream import stream_router

PAGE = Path(__file__).parent / "page"
PROBE_EVERY = 5.0  # seconds
LOG = logging.getLogger(SERVER)


class Holder:
    """The engine, once it is there: a server listens before its model is loaded, and says so."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine, self.failure = engine, ""
        self._probed = -PROBE_EVERY

    def get(self) -> Engine:
        """Raises EngineError while there is none."""
        if self.engine is None:
            raise (
                EngineError(self.failure)
                if self.failure
                else LoadingError("the model is still being loaded; try again in a moment")
            )
        return self.engine

    def probe(self) -> None:
        """Has a failing engine draw something, every few seconds, since nobody else may ask it any more."""
        if time.monotonic() < self._probed + PROBE_EVERY:
            return
        self._probed, engine = time.monotonic(), self.get()
        with suppress(ImagineFlashError):
            engine.submit(GenerateRequest(prompt="a", steps=engine.steps[0], timeout=PROBE_EVERY))


def create_app(engine: Engine | Callable[[], Engine], settings: ServerSettings | None = None) -> FastAPI:
    """The server of an engine, or of what loads one: then it is loaded in the background, and closed with the application.

    Routes: /v1/images/generations, /v1/images/edits, /v1/models (OpenAI's), /v1/stream (WebSocket), / (the page),
    /healthz, /readyz, /metrics, /docs, /openapi.json.
    """
    settings = settings or ServerSettings()
    holder = Holder(engine if isinstance(engine, Engine) else None)
    metrics = Metrics(holder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if isinstance(engine, Engine):
            yield
            return
        loading = asyncio.create_task(_load(holder, engine))
        try:
            yield
        finally:
            await loading
            if holder.engine is not None:
                await asyncio.to_thread(holder.engine.close)
                holder.engine = None

    app = FastAPI(title="Imagine Flash", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.holder, app.state.settings, app.state.metrics = holder, settings, metrics
    app.include_router(images_router(holder, settings, metrics))
    app.include_router(stream_router(holder, settings, metrics))
    _operations(app, holder, metrics)
    _errors(app)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Guard, settings=settings, count=metrics.answered)
    if settings.allowed_origins:  # before the guard: a browser asks for leave without a key, and reads refusals too
        app.add_middleware(
            _Cors,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


class _Cors(CORSMiddleware):
    """Preflights, which never reach the guard, carry its headers too: by them Ray's proxies know our answers."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        response.raw_headers.extend(SAFE)
        return response


async def _load(holder: Holder, load: Callable[[], Engine]) -> None:
    def loaded() -> Engine:
        engine = load()
        engine.warm_up()
        return engine

    try:
        holder.engine = await asyncio.to_thread(loaded)
        LOG.info(holder.engine.describe())
    except ImagineFlashError as error:
        holder.failure = f"the model could not be loaded: {error}"
        LOG.error(holder.failure)
    except Exception as error:
        holder.failure = f"the model could not be loaded: {error!r}"
        LOG.error(holder.failure, exc_info=error)


def _operations(app: FastAPI, holder: Holder, metrics: Metrics) -> None:
    policy = {"content-security-policy": "default-src 'self'; img-src 'self' blob: data:"}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=policy)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html", headers=policy)

    @app.get("/healthz", tags=["operations"], response_class=PlainTextResponse)
    async def healthz() -> PlainTextResponse:
        """The process answers."""
        return PlainTextResponse("ok")

    @app.get(
        "/readyz",
        tags=["operations"],
        response_class=PlainTextResponse,
        responses={503: {"description": "loading, or failing"}},
    )
    async def readyz() -> PlainTextResponse:
        """The model is loaded and warm, and did not fail three times in a row; then it is tried every few seconds."""
        try:
            check_ready(holder)
        except EngineError as error:
            return PlainTextResponse(str(error), status_code=503, headers={"retry-after": "1"})
        return PlainTextResponse("ready")

    for path, probe in (("/healthz", healthz), ("/readyz", readyz)):  # load balancers ask so
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False, response_class=PlainTextResponse)

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), media_type=metrics.content_type)


def check_ready(holder: Holder) -> None:
    """Raises EngineError while there is no model, and after three failures of the backend in a row until it draws again."""
    if (failing := holder.get().stats().failed_in_a_row) >= 3:
        holder.probe()
        raise EngineError(f"the last {failing} requests failed in the backend")


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ImagineFlashError)
    async def ours(request: Request, error: ImagineFlashError) -> JSONResponse:
        status, code = status_of(error)
        headers = {"retry-after": "1"} if status in (429, 503) else {}
        return JSONResponse(error_body(str(error), code=code, status=status, param=error.param), status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = one_line(error.errors()[0])
        return JSONResponse(error_body(message, code=error.errors()[0]["type"], status=400, param=param), 400)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code)
        body = error_body(str(error.detail), code=code, status=error.status_code)
        return JSONResponse(body, error.status_code, error.headers)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("imagine-flash")
    except PackageNotFoundError:
        return "0"
