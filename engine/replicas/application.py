"""The server on Ray Serve: replicas of one engine each, on one machine or many. `imagine-flash serve --ray` runs it here;
`serve run deploy/ray-serve.yaml` and `serve deploy` run it in a cluster.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...core.errors import missing_extra
from ..server.access import refuse
from ..server.app import create_app
from ..server.logs import configure
from ..server.metrics import Metrics
from ..server.settings import ServerSettings

try:
    import ray
    from ray import serve
    from ray.serve import Application
    from ray.serve.metrics import Gauge
except ImportError:
    raise missing_extra("ray", "ray") from None

NAME = "imagine-flash"
OPEN_REQUESTS = 1000  # of one replica, open WebSockets among them; its engine's own queue refuses before
PUBLISHED_EVERY = 5.0  # seconds
SERVICE_RESTART = 1012
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # the application logs every request itself


class Replica:
    """What Ray asks beside requests; `serve.ingress` adds the application as `self.app`."""

    app: Any

    def check_health(self) -> None:
        """Raises EngineError where /readyz is 503: Ray then puts another replica in its place."""
        self.app.state.model.check_ready()


def application(args: dict[str, Any]) -> Application:
    """The deployment, as the import_path of a Serve config names it; args: the options of `imagine-flash serve`. Raises
    RequestError."""
    return deployment(ServerSettings(**args))


def deployment(settings: ServerSettings, **options: Any) -> Application:
    """The deployment; options: of `serve.deployment`, such as num_replicas. A replica that is to end draws what it has
    accepted; WebSockets, which do not end by themselves, are closed with it after 10 seconds."""
    settings = settings.model_copy(update={"image_urls": "data"})  # another replica may be asked for a stored one

    def build() -> FastAPI:
        configure(settings.log_level, settings.log_format)
        share = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
        engine = settings.model_copy(update={"threads": settings.threads or share or None}).load_engine()
        engine.warm_up()
        app = create_app(engine, settings)
        threading.Thread(target=publish, args=(app.state.metrics,), daemon=True).start()
        return app

    replica: Any = serve.ingress(build)(Replica)
    return serve.deployment(
        name=NAME,
        max_ongoing_requests=OPEN_REQUESTS,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=QUIET,
        **options,
    )(replica).bind()


def middlewares() -> list[Middleware]:
    """Of Ray's proxies, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(Unanswered)]


class Unanswered:
    """ASGI middleware. Ray's proxy says nothing where a replica ended before its answer, which uvicorn makes a bare 500, knows
    no path at all once the application is to end, and closes a WebSocket without a reason: here these are a 503 with
    Retry-After, and a 1012, so that clients ask again."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = ""  # the type of the last message, of either side where it is the client's end
        unknown = False  # whether Ray has no application for the path; ours says so in JSON

        async def heard() -> Message:
            nonlocal said
            message = await receive()
            said = message["type"] if message["type"].endswith(".disconnect") else said
            return message

        async def answer(message: Message) -> None:
            nonlocal said, unknown
            if message["type"] == "http.response.start" and message["status"] == 404:
                unknown = (b"content-type", b"application/json") not in map(tuple, message["headers"])
            if unknown:
                return
            if message["type"] == "http.response.start" and message["status"] == 503:
                said_when = any(name.lower() == b"retry-after" for name, _ in message["headers"])
                message["headers"] = [*message["headers"], *([] if said_when else [(b"retry-after", b"1")])]
            said = message["type"]
            await send(message)

        await self.app(scope, heard, answer)
        if scope["type"] == "http" and not said:
            unknown = False
            await refuse(scope, answer, 503, "no_replica", "the replica that drew it ended; try again in a moment")
        elif scope["type"] == "websocket" and said in ("websocket.accept", "websocket.send", ""):
            await send({"type": "websocket.close", "code": SERVICE_RESTART})


def publish(metrics: Metrics) -> None:
    """Hands a replica's metrics to Ray, which exports those of all replicas, each under its name, as ray_imagine_flash_*."""
    gauges: dict[str, Gauge] = {}
    while True:
        for sample in (sample for family in metrics.registry.collect() for sample in family.samples):
            labels: Any = dict(sample.labels)
            if sample.name not in gauges:
                tags: Any = tuple(labels)
                gauges[sample.name] = Gauge(sample.name, tag_keys=tags)
            gauges[sample.name].set(sample.value, labels)
        time.sleep(PUBLISHED_EVERY)
