"""An engine whose arrays stay on onnxruntime's device, on the CPU provider, where that draws what it would on CUDA's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from imagine_flash.engine import Engine
from imagine_flash.engine.backends.onnxruntime_device import Bound, OnnxruntimeOnDevice
from imagine_flash.engine.loading import LoadOptions, check_max_batch
from imagine_flash.engine.tokenizer import PromptTokenizer
from imagine_flash.folders.reading import read_artifact_manifest


class Poisoned(OnnxruntimeOnDevice):
    """What a static array held is gone after each call, so that one which is not written anew shows in the picture."""

    def open(self, graph: str, batch: int) -> Any:
        run = super().open(graph, batch)
        if not isinstance(run, Bound):
            return run

        def start() -> None:
            run.start()
            for static in run.inputs:
                static.write(np.full(static.shape, np.nan if static.dtype.kind == "f" else 1).astype(static.dtype))

        return replace(run, start=start)


def on_device(
    folder: Path,
    *,
    loras: Any = None,
    captures: bool = True,
    route: Any = "stages",
    max_batch: int | None = None,
    **manifest: Any,
) -> Engine:
    """manifest: fields to change in the artifact's."""
    described = read_artifact_manifest(folder).model_copy(update=manifest)
    most = check_max_batch(max_batch, described.batch)
    options = LoadOptions(backend="onnxruntime", device="cpu", loras=loras or {})
    backend = Poisoned(folder, described, options.for_backend(most))
    backend.captures = captures
    backend.prepare(described.stages if route == "stages" else [f"sampler_{max(described.plans)}"])
    tokenizer = PromptTokenizer.load(folder, described.tokenizers)
    return Engine(backend, tokenizer, described, route=route, max_batch=most, folder=folder)


def load(folder: Path, backend: str, **options: Any) -> Engine:
    """In float32, by a backend's name, among them "on device"."""
    if backend == "on device":
        return on_device(folder, **options)
    return Engine.load(folder, backend=backend, precision="fp32", **options)
