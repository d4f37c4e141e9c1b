"""The server on Ray Serve: replicas of one engine each, on one machine or many. `imagine-flash serve --ray` runs it here;
`serve run deploy/ray-serve.yaml` and `serve deploy` run it in a cluster.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware

from ...core.errors import missing_extra
from .app import Holder, check_ready, create_app
from .logs import configure
from .metrics import Metrics
from .ray_proxy import SecondTry
from .settings import RaySettings

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
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # the application logs every request itself


class Replica:
    """What Ray asks beside requests; `serve.ingress` adds the application as `self.app`."""

    app: Any

    def check_health(self) -> None:
        """Raises EngineError where /readyz is 503: Ray then puts another replica in its place."""
        holder: Holder = self.app.state.holder
        check_ready(holder)


def application(args: dict[str, Any]) -> Application:
    """The deployment, as the import_path of a Serve config names it; args: the fields of RaySettings. Raises RequestError."""
    return deployment(RaySettings(**args))


def deployment(settings: RaySettings, **options: Any) -> Application:
    """The deployment; options: of `serve.deployment`, such as num_replicas. A replica that is to end draws what it has
    accepted; WebSockets, which do not end by themselves, are closed with it after 10 seconds."""

    def build() -> FastAPI:
        configure()
        share = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
        engine = settings.model_copy(update={"threads": settings.threads or share or None}).load()
        engine.warm_up()
        app = create_app(engine, settings.server())
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
    return [Middleware(SecondTry)]


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
