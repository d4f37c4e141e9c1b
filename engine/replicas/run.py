"""`imagine-flash serve --ray`: Ray Serve with one engine per replica, until a signal ends it."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from ...core.errors import EngineError, RequestError, missing_extra
from ...folders.hub import local_folder
from ..server.settings import ServerSettings

ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__package__}.application:middlewares",
    "GRPC_ENABLE_FORK_SUPPORT": "0",  # or it says that it does not, whenever a process that reads uploads begins
    "RAY_DEDUP_LOGS": "0",  # one line per request, as without Ray
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 are too few where the replicas load at the same time
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody, unless the user wants it
}
OWN_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's only way to have it listen at 127.0.0.1: to be of one machine
    "RAY_AUTH_MODE": "token",
    "FORWARDED_ALLOW_IPS": "",  # no client says itself where it is
}


def cluster() -> str | None:
    """What RAY_ADDRESS names; None where a Ray of our own is to be started."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


for name, value in (ENVIRONMENT if cluster() else ENVIRONMENT | OWN_RAY).items():
    os.environ.setdefault(name, value)  # read when ray is imported

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.schema import ProxyStatus
except ImportError:
    raise missing_extra("ray", "ray") from None

from .application import NAME, QUIET, deployment  # noqa: E402

CONNECT_TIMEOUT = 3  # seconds, until somebody answers at RAY_ADDRESS
PROXY_TIMEOUT = 180  # seconds that Serve's proxies get after the minute that Ray itself gives them
PER_REPLICA = 16  # requests and open WebSockets of a replica, above which another is started


def run(settings: ServerSettings, *, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, in a Ray of its own, or in the cluster that RAY_ADDRESS names; what was accepted is
    drawn before it ends. Without settings.replicas, as many as the load needs, up to one per GPU, or per machine where there
    is none. ready: called once requests are answered. Raises RequestError for what the machines cannot hold, EngineError where
    no replica starts, KeyboardInterrupt for a signal before `ready`.
    """
    settings.check_model(here=cluster() is None)
    if settings.model is not None:
        local_folder(settings.model)  # a hub id's files, once instead of by every replica
    with _ray(settings.host, settings.port):
        machines = sum(bool(node["Alive"]) for node in ray.nodes())
        options = placement(ray.cluster_resources(), machines, settings)
        try:
            serve.run(deployment(settings, **options), name=NAME)
        except RuntimeError:
            raise EngineError(f"no replica starts: {_reason()}") from None
        stop = threading.Event()
        _on_signals(stop.set)
        ready()
        stop.wait()
        serve.delete(NAME)


def _on_signals(call: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: call())


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """A signal waits until this is over; Ray's own handler is kept out. `ray.init` cut short leaves processes for a minute."""
    came, real = threading.Event(), signal.signal
    _on_signals(came.set)
    signal.signal = lambda number, _: signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal = real
        _on_signals(_interrupt)
    if came.is_set():
        _interrupt()


def placement(resources: Mapping[str, float], machines: int, settings: ServerSettings) -> dict[str, Any]:
    """How many replicas, and what each is given of the cluster's resources: a GPU where there are any, else a share of the
    processors. Raises RequestError where they do not fit."""
    replicas = settings.replicas
    cpus, gpus = resources.get("CPU", 1), int(resources.get("GPU", 0))
    on_gpu = gpus > 0 and settings.device != "cpu"
    most = gpus if on_gpu else machines
    if on_gpu and (replicas or 0) > gpus:
        raise RequestError(f"--replicas {replicas} need a GPU each; Ray has {gpus}")
    if not on_gpu and (replicas or 0) > cpus:
        raise RequestError(f"--replicas {replicas} need a processor each; Ray has {cpus:g}")
    share = cpus / (replicas or most)
    wanted = min(settings.threads or share, share)
    options = {"num_cpus": wanted if wanted < 1 else int(wanted), "num_gpus": int(on_gpu)}
    if replicas is not None:
        return {"num_replicas": replicas, "ray_actor_options": options}
    scaling = {"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": PER_REPLICA, "upscale_delay_s": 5}
    return {"autoscaling_config": scaling, "ray_actor_options": options}


def _reason() -> str:
    """What the last replica that failed said last."""
    said = serve.status().applications[NAME].deployments[NAME].message.strip().splitlines() or ["see Ray's logs"]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", said[-1].strip())


def check_address(address: str) -> None:
    """That somebody listens there; Ray itself would try for 40 seconds. Raises RequestError."""
    if address == "auto":  # Ray looks for it on this machine, and says at once where there is none
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise RequestError(f"RAY_ADDRESS must be HOST:PORT as `ray start` says it, auto or local, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"no Ray answers at RAY_ADDRESS={address} ({reason}); unset it to start one here") from None


@contextmanager
def _ray(host: str, port: int) -> Iterator[None]:
    """Ray with Serve's proxies listening."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address := cluster():
        check_address(address)
    with ExitStack() as ends:
        ends.callback(ray.shutdown)
        try:
            with _signals_deferred():
                ray.init(address or "local", logging_level=logging.WARNING, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EngineError(f"Ray does not start: {str(error).splitlines()[0]}") from None
        if address:
            ends.callback(serve.shutdown)  # the cluster stays
        try:
            serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port}, logging_config=QUIET)
        except TimeoutError:
            wait_for_proxies(PROXY_TIMEOUT)
        except RayError as error:
            raise EngineError(f"Ray's proxies do not start: {str(error).splitlines()[0]}") from None
        yield


def wait_for_proxies(seconds: float) -> None:
    """Until one answers: on a busy machine Ray starts those anew that were late. Raises EngineError."""
    limit = time.monotonic() + seconds
    while ProxyStatus.HEALTHY not in (states := serve.status().proxies).values():
        if time.monotonic() > limit:
            said = ", ".join(sorted({state.value.lower() for state in states.values()})) or "there is none"
            raise EngineError(
                f"Ray's proxies do not start within {60 + seconds:g} s ({said}): is the machine overloaded?"
            )
        time.sleep(0.5)
