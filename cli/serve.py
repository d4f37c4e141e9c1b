"""`imagine-flash serve`."""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ImagineFlashError, RequestError
from .common import ControlNet, Quiet, TinyDecoder, flag, needs, note, say
from .listening import configuration, is_loopback, listen, options_as_typed, url_of

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine.server.settings import ServerSettings


def serve_command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="An artifact or student folder, a hub id or a name of `imagine-flash models`; by default the embedded model.",
        ),
    ] = None,
    tiny_decoder: TinyDecoder = None,
    controlnet: ControlNet = None,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 lets in everybody who can reach this machine."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="INTEGER", help="0 takes a free one.")] = 8000,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="openvino, onnxruntime or tensorrt; for a student torch, torch-compile or torch-graph; by default the "
            "fastest here.",
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cpu, cuda or cuda:N; onnxruntime's tensorrt, tensorrt:N, directml and coreml; Intel's gpu, gpu:N and npu; by "
            "default what the backend finds.",
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fp32, bf16, fp16 or int8, for a student in torch also fp8; by default int8 where the artifact holds it, else "
            "the fastest that reproduces its reference pictures.",
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
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings in YAML by the names of these options, which go before it, and of further limits: docs/serving.md.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The keys of those who may draw, one a line, a name after each; by default everybody may.",
        ),
    ] = None,
    quota: Annotated[
        str | None,
        typer.Option(
            metavar="PICTURES",
            help="Of each key, or without keys of each address, such as '100/minute; 5000/day'; by default any number.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="A web page's origin that may call, such as https://example.org; may be repeated."
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="A proxy, or a network of them such as 10.0.0.0/8, whose x-forwarded-for says who asks; * is any; may be "
            "repeated.",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="A LoRA that requests may ask for by NAME, with a weight of theirs; may be repeated.",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name of the model; may be repeated.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", help="Processor threads of a network call; by default one for each core."),
    ] = None,
    autotune: Annotated[
        bool,
        flag(
            "--autotune", help="torch-compile and torch-graph try kernels out as they load, the first time for minutes."
        ),
    ] = False,
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
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(metavar="NAME", help="json or text.")] = "json",
    quiet: Quiet = False,
) -> None:
    """Serve the model: a page that draws while you type, and an OpenAI-style image API."""
    needs("serve", "fastapi", "uvicorn", "httptools", "websockets", "prometheus_client", "multipart", "limits", "yaml")
    from ..engine.server.settings import read_settings

    given = {name: value for name, value in context.params.items() if _is_given(context, name)}
    with options_as_typed(set(given)):
        settings = read_settings(config, given)
        if quiet and "log_level" not in given and settings.log_level in ("debug", "info"):
            settings = settings.model_copy(update={"log_level": "warning"})
        if not is_loopback(settings.host) and not settings.api_keys:
            note(f"note: everybody who reaches {settings.host} may draw; --api-key-file limits that")
        if settings.ray:
            needs("ray", "ray")
            _serve_on_ray(settings)
        else:
            _serve_here(settings)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, and is a setting."""
    source = context.get_parameter_source(name)
    return name not in ("config", "quiet") and source is not None and source.name != "DEFAULT"


def _serve_here(settings: ServerSettings) -> None:
    """Until a signal ends it. Raises what loading and warming the model raises."""
    import uvicorn

    from ..engine.server import create_app, logs

    settings = _with_a_folder(settings)
    settings.check_model()
    failed: list[ImagineFlashError] = []

    def load() -> Engine:
        engine = settings.load_engine()
        gc.collect()
        gc.freeze()  # what a server keeps is not searched for garbage again
        gc.set_threshold(700)  # from now on often and shortly, between pictures
        return engine

    def end(error: ImagineFlashError) -> None:
        failed.append(error)
        server.should_exit = True

    app = create_app(load, settings, failed=end)
    server = uvicorn.Server(configuration(app, settings))
    listening = listen(settings.host, settings.port)
    say(url_of(settings.host, listening))
    logs.configure(settings.log_level, settings.log_format)
    logging.getLogger(logs.SERVER).addFilter(lambda record: not failed)  # the command says it itself
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        if app.state.model.is_loading:  # in native code, among which Python's own end would abort the process
            print("error: interrupted", file=sys.stderr)
            os._exit(130)
        raise
    if failed:
        raise failed[0]


def _with_a_folder(settings: ServerSettings) -> ServerSettings:
    """Of a model that was described and, where no torch draws it, exported on this machine. Raises ImagineFlashError."""
    from ..models.options import ModelOptions
    from .first_run import ready

    options = ModelOptions(tiny_decoder=settings.tiny_decoder, controlnet=settings.controlnet)
    swaps = bool(settings.lora)
    model = ready(settings.model, options, settings.backend, device=settings.device, swaps=swaps)
    return settings.model_copy(update={"model": model, "controlnet": None, "tiny_decoder": None})  # parts of it now


def _serve_on_ray(settings: ServerSettings) -> None:
    """Until a signal ends it; the URL is said once it draws. Raises ImagineFlashError."""
    from ..engine.replicas.run import cluster, run
    from ..models.catalogue import find

    name = str(settings.model)
    if cluster() is None:
        settings = _with_a_folder(settings)
    elif find(name) is not None and not Path(name).exists():
        raise RequestError(
            f"model: the machines of RAY_ADDRESS load a folder, got {name!r}; run imagine-flash export {name} OUT, and give OUT, "
            "which must be on every one of them"
        )
    with listen(settings.host, settings.port) as free:  # what listens in the end is a process of Ray's
        url, port = url_of(settings.host, free), free.getsockname()[1]
    run(settings.model_copy(update={"port": port}), ready=lambda: say(url))
