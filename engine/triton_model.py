"""The model of a Triton Inference Server that takes prompts: the engine, whose network calls are the server's other models.

`export --format triton-repository` writes a model.py that imports TritonPythonModel from here, and the server's python backend
runs it (README.md of triton-inference-server/python_backend, "Business Logic Scripting"). The package must be installed in
the server's Python; weights are in memory where the server has them, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import EngineError, ImagineFlashError, RequestError
from ..folders.manifests import ArtifactManifest
from ..folders.reading import read_artifact_manifest
from ..folders.triton_model import IMAGES, INPUTS, SEED
from .backends.graphs import GraphBackend, Run
from .engine import Engine
from .request import GenerateRequest
from .tokenizer import PromptTokenizer
from .work import Drawing


class ServedGraphs(GraphBackend[ArtifactManifest]):
    """Each graph is the server's model of that name, which answers in the processor's memory."""

    name = "triton"
    way_out = "see the server's log"

    def open(self, graph: str, batch: int) -> Run:
        utils: Any = import_module("triton_python_backend_utils")
        spec = self.manifest.graphs[graph]
        memory = utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0)

        def run(inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
            given = [
                utils.Tensor(value.name, np.ascontiguousarray(array if array.ndim > 1 else array[:, None]))
                for value, array in zip(spec.inputs, inputs, strict=True)
            ]
            names = [value.name for value in spec.outputs]
            asked = utils.InferenceRequest(
                model_name=graph, requested_output_names=names, inputs=given, preferred_memory=memory
            )
            answer = asked.exec()
            if answer.has_error():
                raise EngineError(answer.error().message())
            found = [utils.get_output_tensor_by_name(answer, name).as_numpy() for name in names]
            return [  # Triton knows no empty dims: (B,) comes as (B, 1)
                np.array(array[:, 0] if len(value.shape) == 1 else array)
                for value, array in zip(spec.outputs, found, strict=True)
            ]

        return run

    def describe(self) -> str:
        return f"Triton Inference Server, {self.manifest.precision}"


class TritonPythonModel:
    """What the server makes one of per instance. Requests that it hands over together share network calls."""

    engine: Engine

    def initialize(self, args: dict[str, str]) -> None:
        """args: model_repository is ARTIFACT/triton_repository/NAME. Raises ArtifactError."""
        folder = Path(args["model_repository"]).resolve().parents[1]
        manifest = read_artifact_manifest(folder)
        backend = ServedGraphs(folder, manifest)
        self.engine = Engine(
            backend, PromptTokenizer.load(folder, manifest.tokenizers), manifest, route="stages", folder=folder
        )
        self._utils: Any = import_module("triton_python_backend_utils")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """An answer for each request: pictures and their seeds, or one line of what was wrong with it."""
        accepted = [self._accept(request) for request in requests]
        return [self._answer(drawings) for drawings in accepted]

    def finalize(self) -> None:
        self.engine.close()

    def _accept(self, request: Any) -> list[Drawing] | ImagineFlashError:
        drawings: list[Drawing] = []
        try:
            drawings += [self.engine.submit(GenerateRequest(**row)) for row in self._rows(request)]
        except ImagineFlashError as error:
            for drawing in drawings:
                drawing.cancel()
            return error
        return drawings

    def _rows(self, request: Any) -> list[dict[str, Any]]:
        """The fields of each picture of a request, whose inputs are (B, 1)."""
        columns: dict[str, list[Any]] = {}
        for name in INPUTS:
            tensor = self._utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                columns[name.lower()] = list(map(_plain, tensor.as_numpy().reshape(-1).tolist()))
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _answer(self, drawings: list[Drawing] | ImagineFlashError) -> Any:
        utils = self._utils
        try:
            if isinstance(drawings, ImagineFlashError):
                raise drawings
            results = [drawing.result() for drawing in drawings]
            if len({result.images.shape for result in results}) > 1:
                raise RequestError("the pictures of one request must have one size; ask for each size by itself")
        except ImagineFlashError as error:
            code = utils.TritonError.INTERNAL if isinstance(error, EngineError) else utils.TritonError.INVALID_ARG
            return utils.InferenceResponse(error=utils.TritonError(str(error), code))
        images = np.concatenate([result.images for result in results])
        seeds = np.array([[result.seed] for result in results], np.int64)
        return utils.InferenceResponse([utils.Tensor(IMAGES, images), utils.Tensor(SEED, seeds)])


def _plain(value: Any) -> Any:
    """Texts come as bytes. Raises RequestError."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise RequestError(f"texts must be UTF-8, got {value[:40]!r}") from None
