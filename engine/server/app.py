"""The application as a function of the engine: `create_app(engine)`."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ... import __version__
from ...core.errors import EngineError, ImagineFlashError, missing_extra
from ...folders.manifests import IMAGE_ENCODER
from ..engine import Engine
from .settings import ServerSettings

try:
    from asgi_correlation_id import CorrelationIdMiddleware
    from fastapi import FastAPI, Response
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import FileResponse, PlainTextResponse
    from fastapi.staticfiles import StaticFiles
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from prometheus_fastapi_instrumentator import Instrumentator
except ImportError as missing:
    raise missing_extra(missing.name or "fastapi", "serve") from None

from .access import PROBES, Access, RequestLog
from .clients import Clients
from .connections import watch_files
from .drawing import ImageService
from .errors import handle_errors
from .images import images_router
from .metrics import Metrics
from .model import ServedModel, retry_headers
from .sdapi import sdapi_router
from .stream import stream_router

PAGE = Path(__file__).parent / "page"
POLICY = {"content-security-policy": "default-src 'self'; img-src 'self' blob: data:"}
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")  # of a proxy in front, so that its log and ours agree
READABLE = ["x-request-id", "retry-after", "retry-after-ms", "x-ignored", "x-drawn-size"]  # by pages of other hosts


def create_app(
    engine: Engine | Callable[[], Engine],
    settings: ServerSettings | None = None,
    *,
    failed: Callable[[ImagineFlashError], None] | None = None,
) -> FastAPI:
    """The server of an engine, or of what loads one: then it is loaded in the background, and closed with the application.
    failed: called with what is wrong with a model that cannot be loaded or warmed.

    Routes: /v1/images/generations, /v1/images/edits, /v1/models (OpenAI's), /sdapi/v1/... (A1111's), /v1/stream (WebSocket),
    / (the page), /healthz, /readyz, /metrics, /docs, /openapi.json.
    """
    settings = (settings or ServerSettings()).with_keys()
    model = ServedModel(engine, failed)
    metrics, clients = Metrics(model), Clients(settings)
    service = ImageService(model, settings, clients, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading, watching = asyncio.create_task(_get_ready(service)), asyncio.create_task(watch_files())
        try:
            yield
        finally:
            for task in (loading, watching):
                task.cancel()
            await asyncio.wait((loading, watching))
            await service.uploads.close()
            await model.close()

    app = FastAPI(
        title="Imagine Flash",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # its answer would name whatever host was asked for
    )
    app.state.model, app.state.metrics = model, metrics
    app.include_router(images_router(service))
    app.include_router(sdapi_router(service))
    app.include_router(stream_router(service))
    _operations(app, model, metrics)
    handle_errors(app, model)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    _middleware(app, settings, clients, metrics)
    return app


def _middleware(app: FastAPI, settings: ServerSettings, clients: Clients, metrics: Metrics) -> None:
    """What every request passes, the last of it first."""
    app.add_middleware(Access, settings=settings, clients=clients)
    if settings.allow_origin:  # before access: a browser asks for leave without a key, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=READABLE,
        )
    app.add_middleware(RequestLog)
    Instrumentator(
        should_group_status_codes=False, excluded_handlers=[f"^{path}$" for path in PROBES], registry=metrics.registry
    ).instrument(app)
    app.add_middleware(
        CorrelationIdMiddleware,
        generator=lambda: secrets.token_hex(8),
        validator=lambda given: REQUEST_ID.fullmatch(given) is not None,
    )


async def _get_ready(service: ImageService) -> None:
    """Loads the model, and begins what reads uploads where it can start from a picture."""
    await service.model.load()
    try:
        manifest = service.engine.manifest
    except EngineError:
        return
    if manifest.control or any(name.startswith(IMAGE_ENCODER) for name in manifest.graph_names):
        service.uploads.start()


def _operations(app: FastAPI, model: ServedModel, metrics: Metrics) -> None:
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=POLICY)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html", headers=POLICY)

    @app.get("/healthz", tags=["operations"], response_class=PlainTextResponse)
    async def healthz() -> PlainTextResponse:
        """The process answers."""
        return PlainTextResponse("ok")

    unready: dict[int | str, dict[str, Any]] = {503: {"description": "loading, or failing"}}

    @app.get("/readyz", tags=["operations"], response_class=PlainTextResponse, responses=unready)
    async def readyz() -> PlainTextResponse:
        """The model is loaded and warm, and did not fail three times in a row; then it is tried every few seconds."""
        try:
            model.check_ready()
        except EngineError as error:
            return PlainTextResponse(str(error), status_code=503, headers=retry_headers(1))
        return PlainTextResponse("ready")

    for path, probe in (("/healthz", healthz), ("/readyz", readyz)):  # load balancers ask so
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False, response_class=PlainTextResponse)

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
