"""TensorRT plans beside an artifact: what a plan is made from, and which of those in the folder fits this machine.

`export/tensorrt.py` writes the recipe and builds the plans. Finding one needs neither the export nor, until there is a plan
to compare, TensorRT.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from ..core.errors import ArtifactError, MissingExtraError, missing_extra, nearest
from .files import sha256_file
from .manifests import WHOLE_SAMPLER, ArtifactManifest
from .reading import read_artifact_manifest

FOLDER = "tensorrt"
RECIPE_FILE = "tensorrt/build.json"
INDEX = "https://pypi.nvidia.com"
COMMAND = "imagine-flash build-tensorrt"

Content = TypeVar("Content", bound=BaseModel)
Profile = dict[str, tuple[list[int], list[int], list[int]]]  # input -> its smallest, optimal and largest shape


class GraphRecipe(BaseModel, frozen=True, extra="forbid"):
    """What one plan is built from: graph and weights, relative to the artifact folder, and the shapes it must take.

    The graph is the artifact's own or a copy in `tensorrt/` with attributes that only TensorRT reads; weights lie in the
    artifact folder for either."""

    file: str
    weights: list[str]
    profile: Profile


class BuildRecipe(BaseModel, frozen=True, extra="forbid"):
    """`tensorrt/build.json`. flags: of the network; those of the builder are chosen when the plans are built."""

    format: Literal["imagine-flash-tensorrt"] = "imagine-flash-tensorrt"
    format_version: Literal[1] = 1
    parser: str
    graphs: dict[str, GraphRecipe]
    flags: list[Literal["STRONGLY_TYPED"]] = ["STRONGLY_TYPED"]


class Machine(BaseModel, frozen=True, extra="forbid"):
    """What a plan depends on beside its graph: the GPU's architecture such as sm_90, and TensorRT's version.

    driver: for the record only. TensorRT binds plans to itself and the architecture, and runs them on any driver new enough
    for it."""

    sm: str
    tensorrt: str
    driver: str = ""


class PlanKey(BaseModel, frozen=True, extra="forbid"):
    """All that a plan was made from; two plans with the same key are interchangeable."""

    sm: str
    tensorrt: str
    graph: str
    graph_sha256: str
    weights_sha256: dict[str, str]
    profiles: list[Profile]
    flags: list[str]

    def profile_for(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Which of the profiles takes inputs of these shapes; None if none does."""
        for index, profile in enumerate(self.profiles):
            bounds = ((profile[name][0], shape, profile[name][2]) for name, shape in shapes.items())
            if all(low <= size <= high for each in bounds for low, size, high in zip(*each, strict=True)):
                return index
        return None

    @property
    def file(self) -> str:
        """The plan's file name: graph, sm, TensorRT version and the first 16 hex digits of the key's SHA-256."""
        digest = hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        return f"{self.graph}_{self.sm}_trt{self.tensorrt}_{digest[:16]}.plan"


class PlanRecord(BaseModel, frozen=True, extra="forbid"):
    """The JSON beside a plan: its key, the SHA-256 of its bytes, and the driver of the machine that built it."""

    key: PlanKey
    sha256: str
    driver: str = ""

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, values: Any) -> Any:
        """Records once had the driver in the key and one profile, so that what differs can still be said."""
        key = values.get("key") if isinstance(values, dict) else None
        if not isinstance(key, dict) or "profile" not in key:
            return values
        rest = {name: value for name, value in key.items() if name not in ("profile", "driver")}
        return {"driver": key.get("driver", ""), **values, "key": {**rest, "profiles": [key["profile"]]}}


def find_plan(folder: str | Path, graph: str, *, machine: Machine | None = None) -> Path | None:
    """The plan of `graph` whose key matches this machine (or `machine`), its SHA-256 checked; None if it has no plans.

    A version-compatible plan also matches a later TensorRT of the same major version. Raises ArtifactError that names the
    differing fields if all plans are for others, or if the plan is damaged; MissingExtraError.
    """
    folder = Path(folder)
    paths = sorted((folder / FOLDER).glob(f"{graph}_sm_*.json"))
    plans = {plan: read_json(path, PlanRecord) for path in paths if (plan := path.with_suffix(".plan")).is_file()}
    if not plans:
        return None
    manifest, recipe = read_artifact_manifest(folder, verify=False), read_json(folder / RECIPE_FILE, BuildRecipe)
    machine = machine or this_machine(folder)
    closest: list[str] = []
    for plan, record in sorted(plans.items(), key=lambda item: len(item[1].key.flags)):  # flags may cost speed
        differences = _differences(record.key, plan_key(manifest, recipe, graph, machine, record.key.flags))
        if not differences:
            if sha256_file(plan) != record.sha256:
                raise ArtifactError(f"{plan} differs from its sha256; delete it and run '{command(folder, graph)}'")
            return plan
        closest = min(closest or differences, differences, key=len)
    raise ArtifactError(
        f"no TensorRT plan of {graph!r} fits: {', '.join(closest)}; run '{command(folder, graph)}' here"
    )


def command(folder: str | Path, graph: str) -> str:
    """What builds the plan of a graph, among others."""
    return f"{COMMAND} {folder}{' --whole-sampler' if graph.startswith(WHOLE_SAMPLER) else ''}"


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
        profiles=profiles_of(built.profile),
        flags=sorted({*recipe.flags, *flags}),
        sm=machine.sm,
        tensorrt=machine.tensorrt,
    )


def profiles_of(shapes: Profile) -> list[Profile]:
    """The optimization profiles of a plan: the smallest batch alone, then the rest of the range, if there is one.

    Kernels are chosen by their time at the optimum. A lone picture is what one person waits for, so its profile is fully
    static; the other's optimum is the largest batch, where the GPU is busiest.
    """
    lone: Profile = {name: (low, low, low) for name, (low, _, _) in shapes.items()}
    if all(low == high for low, _, high in shapes.values()):
        return [lone]

    def above(low: list[int], high: list[int]) -> list[int]:
        return [low[0] + 1, *low[1:]] if low != high else low

    return [lone, {name: (above(low, high), best, high) for name, (low, best, high) in shapes.items()}]


def this_machine(folder: str | Path = "FOLDER") -> Machine:
    """The first CUDA device and the TensorRT of this process; `folder` is for the message of what to run elsewhere.

    Asks the driver's own library CUDA, since it keeps to CUDA_VISIBLE_DEVICES and NVML does not. Raises MissingExtraError
    without TensorRT, ArtifactError without a GPU.
    """
    elsewhere = f"run '{COMMAND} {folder}' on the machine with the GPU"
    try:
        trt: Any = import_module("tensorrt")
    except (ImportError, OSError):
        what = f"{missing_extra('tensorrt', 'tensorrt')} (pip install tensorrt; it comes from {INDEX})"
        raise MissingExtraError(f"{what}, then {elsewhere}") from None
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise ArtifactError(f"no NVIDIA driver here ({error}); {elsewhere}") from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    codes = [cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0)]
    for attribute, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        codes.append(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    if any(codes):
        raise ArtifactError(f"no usable NVIDIA GPU here (the driver answers {codes}, 0 is good); {elsewhere}")
    return Machine(sm=f"sm_{major.value}{minor.value}", tensorrt=trt.__version__, driver=_driver())


def _driver() -> str:
    """The driver's version as NVML tells it; "" where there is no NVML."""
    version = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return ""
    failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version))
    return "" if failed else version.value.decode()


def read_json(path: Path, kind: type[Content]) -> Content:
    """A recipe or a record. Raises ArtifactError, naming the file and its first wrong field."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; export again with the format 'tensorrt'") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise ArtifactError(f"{path}: {field}{first['msg']}; delete it, or export again") from None


def _differences(built: PlanKey, wanted: PlanKey) -> list[str]:
    """What keeps a plan from being the wanted one, in words; a version-compatible one may be of an earlier TensorRT."""
    here, there = wanted.model_dump(), built.model_dump()
    if "VERSION_COMPATIBLE" in built.flags:
        new, old = ([int(n) for n in re.findall(r"\d+", key.tensorrt)] for key in (wanted, built))
        if new[0] == old[0] and new >= old:
            there["tensorrt"] = here["tensorrt"]
    told = {field: f" is {here[field]} here and {there[field]} in the plan" for field in ("sm", "tensorrt")}
    return [field + told.get(field, " differs") for field in here if here[field] != there[field]]
