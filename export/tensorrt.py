"""TensorRT plans of an artifact: the recipe is written at export, the plans are built from it on the machine with the GPU.

Plain `tensorrt` rather than Polygraphy: one build is some fifteen calls, all of them in both 10.x and 11.x, and the wrapper
would be one more package to install. Networks are strongly typed (11.x knows no others), so the precision is the graph's
own; float32 products may be computed as TF32, which is TensorRT's default. There is one static profile per graph.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ..core.artifact import ArtifactManifest, GraphSpec, read_artifact_manifest
from ..core.errors import ArtifactError, MissingExtraError, missing_extra, nearest
from ..core.files import atomic_file, sha256_file
from .tensorrt_operators import PARSER_VERSION, check_graph

FOLDER = "tensorrt"
RECIPE_FILE = "tensorrt/build.json"
INDEX = "https://pypi.nvidia.com"
COMMAND = "imagine-flash build-tensorrt"

Profile = dict[str, tuple[list[int], list[int], list[int]]]  # input -> its smallest, optimal and largest shape


class GraphRecipe(BaseModel, frozen=True, extra="forbid"):
    """What one plan is built from: graph and weights, relative to the artifact folder, and the shapes it must take."""

    file: str
    weights: list[str]
    profile: Profile


class BuildRecipe(BaseModel, frozen=True, extra="forbid"):
    """`tensorrt/build.json`. flags: of the network; those of the builder are chosen when the plans are built."""

    format: Literal["imagine-flash-tensorrt"] = "imagine-flash-tensorrt"
    format_version: Literal[1] = 1
    parser: str = PARSER_VERSION
    graphs: dict[str, GraphRecipe]
    flags: list[Literal["STRONGLY_TYPED"]] = ["STRONGLY_TYPED"]


class Machine(BaseModel, frozen=True, extra="forbid"):
    """What a plan depends on beside its graph: the GPU's architecture such as sm_90, driver and TensorRT versions."""

    sm: str
    driver: str
    tensorrt: str


class PlanKey(Machine, frozen=True):
    """All that a plan was made from; two plans with the same key are interchangeable."""

    graph: str
    graph_sha256: str
    weights_sha256: dict[str, str]
    profile: Profile
    flags: list[str]

    @property
    def file(self) -> str:
        """The plan's file name: graph, sm, TensorRT version and the first 16 hex digits of the key's SHA-256."""
        digest = hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        return f"{self.graph}_{self.sm}_trt{self.tensorrt}_{digest[:16]}.plan"


class PlanRecord(BaseModel, frozen=True, extra="forbid"):
    """The JSON beside a plan: its key and the SHA-256 of its bytes."""

    key: PlanKey
    sha256: str


def write_tensorrt(folder: Path, manifest: ArtifactManifest) -> dict[str, Any]:
    """Writes tensorrt/build.json and returns what `manifest.formats["tensorrt"]` holds.

    Raises ArtifactError for a graph with an opset, operator or type that TensorRT's ONNX parser does not list, or with a
    free axis other than the batch; MissingExtraError without onnx.
    """
    try:
        import onnx
    except ImportError:
        raise missing_extra("onnx", "export") from None
    graphs = {}
    for name, spec in manifest.graphs.items():
        model = onnx.load(folder / spec.file, load_external_data=False)
        check_graph(name, model)
        external = {e.value for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"}
        weights = sorted((PurePosixPath(spec.file).parent / location).as_posix() for location in external)
        graphs[name] = GraphRecipe(file=spec.file, weights=weights, profile=batch_profile(spec, manifest.batch))
    (folder / FOLDER).mkdir(exist_ok=True)
    with atomic_file(folder / RECIPE_FILE) as temporary:
        temporary.write_text(BuildRecipe(graphs=graphs).model_dump_json(indent=2), encoding="utf-8")
    return {"recipe": RECIPE_FILE, "parser": PARSER_VERSION, "graphs": sorted(graphs)}


def batch_profile(spec: GraphSpec, batch: tuple[int, int]) -> Profile:
    """The shapes a plan must take: the batch runs from batch[0] to batch[1], everything else is fixed.

    The optimum is the largest batch: kernels are chosen by their time at the optimum, and there the GPU is busiest; a
    small batch waits mostly for launches, whatever kernel is launched. Raises ArtifactError for another free axis.
    """
    profile: Profile = {}
    for tensor in spec.inputs:
        rest = [size for size in tensor.shape[1:] if isinstance(size, int)]
        if len(tensor.shape) > len(rest) + 1:
            wrong = f"the input {tensor.name!r} has the shape {tensor.shape}, but only its first axis may be free"
            raise ArtifactError(f"{spec.file}: {wrong} in a TensorRT plan; export one graph per size")
        low, high = ([n if isinstance(size, str) else size for size in tensor.shape[:1]] + rest for n in batch)
        profile[tensor.name] = (low, high, high)
    return profile


def build_plans(
    folder: str | Path,
    *,
    graphs: Sequence[str] | None = None,
    version_compatible: bool = False,
    refit: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Path]:
    """Builds the plans of an artifact for the GPU of this machine and returns their paths; what is there is kept.

    graphs: which; by default all. version_compatible: later TensorRTs of the same major version run the plans too. refit:
    weights may be replaced later. progress is told what is being done. Raises ArtifactError, MissingExtraError.
    """
    folder = Path(folder)
    manifest, recipe = read_artifact_manifest(folder), _read(folder / RECIPE_FILE, BuildRecipe)
    machine = this_machine(folder)
    flags = ["VERSION_COMPATIBLE"] * version_compatible + ["REFIT"] * refit
    keys = [plan_key(manifest, recipe, name, machine, flags) for name in graphs or recipe.graphs]
    for key in keys:
        plan = folder / FOLDER / key.file
        record = plan.with_suffix(".json")
        if plan.is_file() and record.is_file() and sha256_file(plan) == _read(record, PlanRecord).sha256:
            progress(f"{plan.name} is there")
        else:
            progress(f"building {plan.name}")
            write_plan(folder, key, _build(folder / recipe.graphs[key.graph].file, key, folder / FOLDER))
    return [folder / FOLDER / key.file for key in keys]


def find_plan(folder: str | Path, graph: str, *, machine: Machine | None = None) -> Path | None:
    """The plan of `graph` whose key matches this machine (or `machine`), its SHA-256 checked; None if it has no plans.

    A version-compatible plan also matches a later TensorRT of the same major version. Raises ArtifactError that names the
    differing fields if all plans are for others, or if the plan is damaged; MissingExtraError.
    """
    folder = Path(folder)
    paths = sorted((folder / FOLDER).glob(f"{graph}_sm_*.json"))
    plans = {plan: _read(path, PlanRecord) for path in paths if (plan := path.with_suffix(".plan")).is_file()}
    if not plans:
        return None
    manifest, recipe = read_artifact_manifest(folder, verify=False), _read(folder / RECIPE_FILE, BuildRecipe)
    machine = machine or this_machine(folder)
    closest: list[str] = []
    for plan, record in sorted(plans.items(), key=lambda item: len(item[1].key.flags)):  # flags may cost speed
        differences = _differences(record.key, plan_key(manifest, recipe, graph, machine, record.key.flags))
        if not differences:
            if sha256_file(plan) != record.sha256:
                raise ArtifactError(f"{plan} differs from its sha256; delete it and run '{COMMAND} {folder}'")
            return plan
        closest = min(closest or differences, differences, key=len)
    raise ArtifactError(f"no TensorRT plan of {graph!r} fits: {', '.join(closest)}; run '{COMMAND} {folder}' here")


def plan_key(
    manifest: ArtifactManifest, recipe: BuildRecipe, graph: str, machine: Machine, flags: Sequence[str] = ()
) -> PlanKey:
    """The key of a plan, from the hashes in the manifest. Raises ArtifactError for files or graphs not listed there."""
    if graph not in recipe.graphs.keys() & manifest.graphs.keys():
        raise ArtifactError(f"no TensorRT recipe for the graph {graph!r}{nearest(graph, recipe.graphs)}; export again")
    built = recipe.graphs[graph]
    for file in (built.file, *built.weights):
        if file not in manifest.files:
            raise ArtifactError(f"{RECIPE_FILE} uses {file!r}, which the manifest does not list; export again")
    return PlanKey(
        graph=graph,
        graph_sha256=manifest.files[built.file],
        weights_sha256={file: manifest.files[file] for file in built.weights},
        profile=built.profile,
        flags=sorted({*recipe.flags, *flags}),
        **machine.model_dump(),
    )


def write_plan(folder: Path, key: PlanKey, plan: bytes) -> Path:
    """Writes a plan, then its record; a plan without one counts as not there."""
    path = folder / FOLDER / key.file
    record = PlanRecord(key=key, sha256=hashlib.sha256(plan).hexdigest()).model_dump_json(indent=2)
    for target, content in ((path, plan), (path.with_suffix(".json"), record.encode())):
        with atomic_file(target) as temporary:
            temporary.write_bytes(content)
    return path


def this_machine(folder: str | Path = "FOLDER") -> Machine:
    """The first CUDA device and the TensorRT of this process; `folder` is for the message of what to run elsewhere.

    Asks the driver's own libraries: CUDA for the device, since it keeps to CUDA_VISIBLE_DEVICES and NVML does not, and
    NVML for the driver's version. Raises MissingExtraError without TensorRT, ArtifactError without a GPU.
    """
    elsewhere = f"run '{COMMAND} {folder}' on the machine with the GPU"
    try:
        trt: Any = import_module("tensorrt")
    except (ImportError, OSError):
        what = f"{missing_extra('tensorrt', 'tensorrt')} (pip install tensorrt; it comes from {INDEX})"
        raise MissingExtraError(f"{what}, then {elsewhere}") from None
    names = ("nvcuda.dll", "nvml.dll") if sys.platform == "win32" else ("libcuda.so.1", "libnvidia-ml.so.1")
    try:
        cuda, nvml = map(ctypes.CDLL, names)
    except OSError as error:
        raise ArtifactError(f"no NVIDIA driver here ({error}); {elsewhere}") from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver = ctypes.create_string_buffer(96)
    codes = [cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0)]
    for attribute, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        codes.append(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    codes += [nvml.nvmlInit_v2(), nvml.nvmlSystemGetDriverVersion(driver, len(driver))]
    if any(codes):
        raise ArtifactError(f"no usable NVIDIA GPU here (the driver answers {codes}, 0 is good); {elsewhere}")
    return Machine(sm=f"sm_{major.value}{minor.value}", driver=driver.value.decode(), tensorrt=trt.__version__)


def _build(path: Path, key: PlanKey, caches: Path) -> bytes:
    """One plan, with the timings of earlier builds. Raises ArtifactError with TensorRT's first message."""
    trt: Any = import_module("tensorrt")
    errors: list[str] = []

    class Log(trt.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(msg)

    def failed(what: str) -> ArtifactError:
        why = " ".join(errors[0].split()) if errors else "it does not say why"
        return ArtifactError(f"{key.graph}: TensorRT {key.tensorrt} {what}: {why}")

    logger = Log()
    try:
        builder = trt.Builder(logger)
    except TypeError:  # pybind11's word for a null pointer
        raise failed("cannot start on this machine") from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors[:0] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise failed(f"cannot parse {path.name}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor, shapes in key.profile.items():
        profile.set_shape(tensor, *map(tuple, shapes))
    config.add_optimization_profile(profile)
    flags = {"VERSION_COMPATIBLE": trt.BuilderFlag.VERSION_COMPATIBLE, "REFIT": trt.BuilderFlag.REFIT}
    for flag in flags.keys() & key.flags:
        config.set_flag(flags[flag])
    timings = caches / f"timing_{key.sm}_trt{key.tensorrt}.cache"
    for known in (timings.read_bytes() if timings.is_file() else b"", b""):  # TensorRT refuses those of another GPU
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            break
    errors.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failed(f"cannot build {path.name}")
    with atomic_file(timings) as temporary:
        temporary.write_bytes(config.get_timing_cache().serialize())
    return bytes(plan)


def _differences(built: PlanKey, wanted: PlanKey) -> list[str]:
    """What keeps a plan from being the wanted one, in words; a version-compatible one may be of an earlier TensorRT."""
    here, there = wanted.model_dump(), built.model_dump()
    if "VERSION_COMPATIBLE" in built.flags:
        new, old = ([int(n) for n in re.findall(r"\d+", key.tensorrt)] for key in (wanted, built))
        if new[0] == old[0] and new >= old:
            there["tensorrt"] = here["tensorrt"]
    told = {field: f" is {here[field]} here and {there[field]} in the plan" for field in Machine.model_fields}
    return [field + told.get(field, " differs") for field in here if here[field] != there[field]]


def _read(path: Path, kind: Any) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; export again with the format 'tensorrt'") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise ArtifactError(f"{path}: {field}{first['msg']}; delete it, or export again") from None
