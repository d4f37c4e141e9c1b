"""A model repository for NVIDIA Triton Inference Server: one model per graph, run by its onnxruntime backend.

Every model folder holds weights.bin beside its model.onnx, because onnxruntime refuses external data that leave the model's
folder, by ".." as well as by a symbolic link (1.31.1: "External data path escapes model directory"). The repository has one
copy of the weights, and every model folder a hard link to it where the file system has them. The artifact's own file is not
linked, because the onnx package refuses data with more than one hard link.

Configuration: docs/user_guide/model_configuration.md and batcher.md of triton-inference-server/server, model_config.proto of
triton-inference-server/common.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.errors import ArtifactError, missing_extra
from ..folders.files import atomic_folder
from ..folders.manifests import ArtifactManifest, GraphSpec, TensorSpec

FOLDER = "triton_repository"
CONFIG_FILE = "config.pbtxt"
MODEL_FILE = "model.onnx"  # the backend's default
VERSION = "1"
QUEUE_DELAY = 1000  # microseconds that a request may wait for others to share its batch
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
}


def write_triton_repository(folder: Path, manifest: ArtifactManifest) -> dict[str, Any]:
    """Writes folder/triton_repository/NAME/{config.pbtxt, 1/model.onnx, 1/weights.bin}; returns what the manifest says.

    Serve it with `tritonserver --model-repository FOLDER/triton_repository`. Batches up to the manifest's largest; a
    batch below its smallest, which no one checked, is not refused by the server. "linked" is False where a file had to be
    copied. Raises ArtifactError, MissingExtraError; an older repository gives way only when the new one is whole.
    """
    models: dict[str, Any] = {}
    copies: dict[Path, Path] = {}
    linked = True
    with atomic_folder(folder / FOLDER, replaces=[f"{name}/{CONFIG_FILE}" for name in manifest.graphs]) as target:
        for name, spec in manifest.graphs.items():
            weights = _external_files(folder, spec)
            version = target / name / VERSION
            version.mkdir(parents=True)
            (target / name / CONFIG_FILE).write_text(config_text(name, spec, manifest.batch[1]), encoding="utf-8")
            graph = PurePosixPath(spec.file)
            for source, place in [(graph, MODEL_FILE), *((graph.parent / file, file) for file in weights)]:
                linked &= _place(folder / source, version / place, copies)
            models[name] = {
                "config": f"{FOLDER}/{name}/{CONFIG_FILE}",
                "model": f"{FOLDER}/{name}/{VERSION}/{MODEL_FILE}",
            }
    return {"backend": "onnxruntime", "max_batch_size": manifest.batch[1], "linked": linked, "models": models}


def config_text(name: str, spec: GraphSpec, max_batch: int) -> str:
    """The config.pbtxt of a graph: a ModelConfig in protobuf's text format.

    One instance per GPU, on the CPU where there is none. The preferred batch is the largest, as it is for a server that is
    told none; a model of batch 1 has no dynamic batching. Raises ArtifactError for a tensor that Triton does not take.
    """
    parts = [
        f"name: {_quoted(name)}",
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch}",
        *(_tensor("input", name, tensor) for tensor in spec.inputs),
        *(_tensor("output", name, tensor) for tensor in spec.outputs),
        f"version_policy {{ latest {{ num_versions: {VERSION} }} }}",
        "instance_group [ { count: 1 kind: KIND_AUTO } ]",
    ]
    if max_batch > 1:
        parts.append(
            f"dynamic_batching {{\n  preferred_batch_size: [ {max_batch} ]\n"
            f"  max_queue_delay_microseconds: {QUEUE_DELAY}\n}}"
        )
    return "\n".join(parts) + "\n"


def _tensor(kind: str, graph: str, tensor: TensorSpec) -> str:
    """An input or output without its batch axis; -1 for another free one.

    Triton knows no empty dims: a tensor of shape (batch,), such as the timestep, is (batch, 1) to the client and loses its
    last axis by `reshape`.
    """
    if tensor.dtype not in DATA_TYPES:
        raise ArtifactError(
            f"{graph}: {tensor.name} is {tensor.dtype}, which Triton's onnxruntime backend does not take; "
            f"it takes {', '.join(DATA_TYPES)}"
        )
    if not tensor.shape or not isinstance(tensor.shape[0], str):
        raise ArtifactError(f"{graph}: the first axis of {tensor.name} must be a free batch, got shape {tensor.shape}")
    dims = [-1 if isinstance(size, str) else size for size in tensor.shape[1:]]
    lines = [f"name: {_quoted(tensor.name)}", f"data_type: {DATA_TYPES[tensor.dtype]}", f"dims: {_list(dims or [1])}"]
    if not dims:
        lines.append("reshape { shape: [ ] }")
    return f"{kind} {{\n" + "".join(f"  {line}\n" for line in lines) + "}"


def _list(values: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"


def _quoted(text: str) -> str:
    """A string of the text format: bytes beyond printable ASCII, quotes and backslashes as octal escapes."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'


def _external_files(folder: Path, spec: GraphSpec) -> list[str]:
    """The files that a graph's large tensors lie in, relative to the graph's own folder. Raises ArtifactError."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise missing_extra("onnx", "export") from None
    path = folder / spec.file
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: {spec.file} is missing; run 'imagine-flash export' again") from None
    except DecodeError:
        raise ArtifactError(f"{path} is no ONNX graph; run 'imagine-flash export' again") from None
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    files = sorted({entry.value for entry in entries if entry.key == "location"})
    for file in files:
        if PurePosixPath(file).name != file:
            raise ArtifactError(
                f"{path} keeps weights in {file!r}, outside its folder; run 'imagine-flash export' again"
            )
        if not (path.parent / file).is_file():
            raise ArtifactError(f"{folder}: {file} is missing; run 'imagine-flash export' again")
    return files


def _place(source: Path, target: Path, copies: dict[Path, Path]) -> bool:
    """A copy the first time and hard links to it from then on, or copies where the file system refuses (returns False)."""
    try:
        if source in copies:
            os.link(copies[source], target)
            return True
    except OSError:
        shutil.copyfile(source, target)
        return False
    copies[source] = target
    shutil.copyfile(source, target)
    return True
