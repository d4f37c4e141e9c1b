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
from ..folders.manifests import STAGES, ArtifactManifest, GraphSpec, TensorSpec
from ..folders.triton_model import CODE, IMAGES, INPUTS, NAME, SEED

FOLDER = "triton_repository"
CONFIG_FILE = "config.pbtxt"
MODEL_FILE, CODE_FILE = "model.onnx", "model.py"  # the backends' defaults
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
    """Writes folder/triton_repository/NAME/{config.pbtxt, 1/model.onnx, 1/weights.bin}, and where all stages are there the
    model `text_to_image`, which takes prompts and has the others draw; returns what the manifest says.

    Serve it with `tritonserver --model-repository FOLDER/triton_repository`. Batches up to the manifest's largest; a
    batch below its smallest, which no one checked, is not refused by the server. "linked" is False where a file had to be
    copied. Raises ArtifactError, MissingExtraError; an older repository gives way only when the new one is whole.
    """
    graphs = manifest.graphs
    takes_prompts = manifest.control is None and set(STAGES) <= graphs.keys()
    models: dict[str, Any] = {}
    copies: dict[Path, Path] = {}
    linked = True
    with atomic_folder(folder / FOLDER, replaces=[f"{name}/{CONFIG_FILE}" for name in graphs]) as target:
        for name, spec in graphs.items():
            weights = _external_files(folder, spec)
            version = target / name / VERSION
            version.mkdir(parents=True)
            (target / name / CONFIG_FILE).write_text(config_text(name, spec, manifest.batch[1]), encoding="utf-8")
            graph = PurePosixPath(spec.file)
            for source, place in [(graph, MODEL_FILE), *((graph.parent / file, file) for file in weights)]:
                linked &= _place(folder / source, version / place, copies)
            models[name] = _record(name, MODEL_FILE)
        if takes_prompts:
            (target / NAME / VERSION).mkdir(parents=True)
            (target / NAME / VERSION / CODE_FILE).write_text(CODE, encoding="utf-8")
            (target / NAME / CONFIG_FILE).write_text(prompt_config_text(manifest), encoding="utf-8")
            models[NAME] = _record(NAME, CODE_FILE)
    return {"backend": "onnxruntime", "max_batch_size": manifest.batch[1], "linked": linked, "models": models}


def _record(name: str, file: str) -> dict[str, str]:
    return {"config": f"{FOLDER}/{name}/{CONFIG_FILE}", "model": f"{FOLDER}/{name}/{VERSION}/{file}"}


def prompt_config_text(manifest: ArtifactManifest) -> str:
    """The config.pbtxt of the model that takes prompts, of the python backend. Its own work is small: it is on the CPU."""
    size = [-1, -1] if len(manifest.sizes) > 1 else list(manifest.sizes[0])
    required = next(iter(INPUTS))
    inputs = [
        _tensor_text("input", name, kind, [1], [] if name == required else ["optional: true"])
        for name, kind in INPUTS.items()
    ]
    parts = [
        f"name: {_quoted(NAME)}",
        'backend: "python"',
        f"max_batch_size: {manifest.batch[1]}",
        *inputs,
        _tensor_text("output", IMAGES, "TYPE_UINT8", [*size, 3]),
        _tensor_text("output", SEED, "TYPE_INT64", [1]),
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *_batching(manifest.batch[1]),
    ]
    return "\n".join(parts) + "\n"


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
        *_batching(max_batch),
        *(_warm_up(name, spec, batch) for batch in sorted({1, max_batch})),
    ]
    return "\n".join(parts) + "\n"


def _batching(max_batch: int) -> list[str]:
    """Dynamic batching, of a model that takes more than one picture."""
    lines = f"preferred_batch_size: [ {max_batch} ]\n  max_queue_delay_microseconds: {QUEUE_DELAY}"
    return [f"dynamic_batching {{\n  {lines}\n}}"] if max_batch > 1 else []


def _warm_up(graph: str, spec: GraphSpec, batch: int) -> str:
    """A call before the model counts as ready: what its backend chooses or allocates at a first one is no request's wait."""
    lines = [f'name: "batch of {batch}"', f"batch_size: {batch}"]
    for tensor in spec.inputs:
        kind, dims = _kind_and_dims(graph, tensor)
        value = f"data_type: {kind} dims: {_list(dims or [1])} zero_data: true"
        lines.append(f"inputs {{ key: {_quoted(tensor.name)} value {{ {value} }} }}")
    return "model_warmup {\n" + "".join(f"  {line}\n" for line in lines) + "}"


def _tensor(kind: str, graph: str, tensor: TensorSpec) -> str:
    """An input or output without its batch axis; -1 for another free one.

    Triton knows no empty dims: a tensor of shape (batch,), such as the timestep, is (batch, 1) to the client and loses its
    last axis by `reshape`.
    """
    data_type, dims = _kind_and_dims(graph, tensor)
    return _tensor_text(kind, tensor.name, data_type, dims or [1], [] if dims else ["reshape { shape: [ ] }"])


def _kind_and_dims(graph: str, tensor: TensorSpec) -> tuple[str, list[int]]:
    """Raises ArtifactError for a tensor that Triton does not take."""
    if tensor.dtype not in DATA_TYPES:
        raise ArtifactError(
            f"{graph}: {tensor.name} is {tensor.dtype}, which Triton's onnxruntime backend does not take; "
            f"it takes {', '.join(DATA_TYPES)}"
        )
    if not tensor.shape or not isinstance(tensor.shape[0], str):
        raise ArtifactError(f"{graph}: the first axis of {tensor.name} must be a free batch, got shape {tensor.shape}")
    return DATA_TYPES[tensor.dtype], [-1 if isinstance(size, str) else size for size in tensor.shape[1:]]


def _tensor_text(kind: str, name: str, data_type: str, dims: Sequence[int], more: Sequence[str] = ()) -> str:
    lines = [f"name: {_quoted(name)}", f"data_type: {data_type}", f"dims: {_list(dims)}", *more]
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
