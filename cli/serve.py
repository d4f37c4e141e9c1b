"""`imagine-flash serve`."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import EngineError, ImagineFlashError, RequestError
from .common import Quiet, flag, needs, note, say

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine.server.settings import EngineSettings, RaySettings, ServerSettings


OPTIONS = {  # what errors call a setting -> what the user typed
    "host": "--host",
    "device": "--device",
    "max_waiting": "--max-queue",
    "max_batch": "--max-batch",
    "timeout": "--timeout",
    "threads": "--threads",
    "allowed_origins": "--allow-origin",
}


def serve_command(
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="An artifact or student folder; by default the embedded model."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 lets in everybody who can reach this machine."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="INTEGER", help="0 takes a free one.")] = 8000,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="openvino, onnxruntime or tensorrt; by default the fastest here.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N; by default what the backend finds.")
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fp32, bf16 or fp16; by default the fastest that reproduces the artifact's reference pictures.",
        ),
    ] = "auto",
    max_queue: Annotated[
        int, typer.Option(metavar="INTEGER", help="Pictures that may wait; more are refused with 429.")
    ] = 64,
    max_batch: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", help="Most pictures of one network call; by default the artifact's most."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="The longest that a request may take.")] = 60.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The keys of those who may draw, one a line; by default everybody may."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="A web page's origin that may call, such as https://example.org; may be repeated."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", help="Processor threads of a network call; by default one for each core."),
    ] = None,
    ray: Annotated[
        bool,
        flag(
            "--ray", help="Run replicas of one engine each on Ray Serve, on this machine or the cluster of RAY_ADDRESS."
        ),
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", help="With --ray; by default as many as the load needs, up to one per GPU or machine."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Serve the model: a page that draws while you type, and an OpenAI-style image API."""
    needs("serve", "fastapi", "uvicorn", "httptools", "websockets", "prometheus_client", "multipart")
    from ..engine.server.settings import EngineSettings, RaySettings, ServerSettings, read_keys

    if not 0 <= port <= 65535:
        raise RequestError(f"--port must be 0 to 65535, got {port}")
    if replicas is not None and (replicas < 1 or not ray):
        raise RequestError(f"--replicas must be at least 1 and go with --ray, got {replicas}")
    engine: dict[str, Any] = {
        "model": model,
        "backend": backend,
        "device": device,
        "precision": precision,
        "max_waiting": max_queue,
        "max_batch": max_batch,
        "threads": threads,
    }
    origins = tuple(allow_origin or ())
    with _options_as_typed():
        if not _is_loopback(host) and api_key_file is None:
            note(f"note: everybody who reaches {host} may draw; --api-key-file limits that")
        if ray:
            needs("ray", "ray")
            asked = RaySettings(**engine, api_key_file=api_key_file, timeout=timeout, allowed_origins=origins)
            _serve_on_ray(asked, host, port, replicas)
        else:
            keys = () if api_key_file is None else read_keys(api_key_file)
            settings = ServerSettings(api_keys=keys, timeout=timeout, allowed_origins=origins)
            _serve_here(EngineSettings(**engine), settings, host, port)


def _serve_here(engine: EngineSettings, settings: ServerSettings, host: str, port: int) -> None:
    """Until a signal ends it. Raises what loading the model raises."""
    import uvicorn

    from ..engine.server import create_app, logs
    from ..engine.server.heads import LimitedHeads

    engine.check()
    failed: list[ImagineFlashError] = []

    def load() -> Engine:
        try:
            loaded = engine.load()
            loaded.warm_up()
            return loaded
        except Exception as error:
            ours = isinstance(error, ImagineFlashError)
            failed.append(error if ours else EngineError(f"the model could not be loaded: {error!r}"))
            server.should_exit = True
            raise

    config = uvicorn.Config(
        create_app(load, settings),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        http=LimitedHeads,
        ws="websockets-sansio",
        ws_max_size=settings.max_body,
        ws_ping_interval=20,
        ws_per_message_deflate=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
        server_header=False,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    listening = _listen(host, port)
    say(_url(host, listening))
    logs.configure()
    logging.getLogger(logs.SERVER).addFilter(lambda record: not failed)  # the command says it itself
    server.run(sockets=[listening])
    if failed:
        raise failed[0]


def _serve_on_ray(settings: RaySettings, host: str, port: int, replicas: int | None) -> None:
    """Until a signal ends it; the URL is said once it draws. Raises ImagineFlashError."""
    from ..engine.server.ray_run import run

    with _listen(host, port) as free:  # what listens in the end is a process of Ray's
        url, port = _url(host, free), free.getsockname()[1]
    run(settings, host=host, port=port, replicas=replicas, ready=lambda: say(url))


@contextmanager
def _options_as_typed() -> Iterator[None]:
    """A setting that cannot be is called by its option: --max-queue, not max_waiting."""
    try:
        yield
    except ImagineFlashError as error:
        name = str(error).partition(" ")[0].rstrip(":")
        if name not in OPTIONS:
            raise
        raise type(error)(OPTIONS[name] + str(error).removeprefix(name)) from None


def _url(host: str, listening: socket.socket) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listening.getsockname()[1]}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise RequestError(
            f"cannot listen at {host}:{port} ({str(error.strerror).partition(' (')[0]}); choose another --port or --host"
        ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise RequestError(f"host must be an address such as 127.0.0.1 or 0.0.0.0, got {host!r}") from None
