"""The manifests of the two folders this project writes, and how to read them without trusting them.

A student folder is a diffusers pipeline plus `imagine_flash.json`; an artifact folder is `manifest.json` plus graphs
and tokenizer. Reading raises ArtifactError with one line that names the folder, the field or file, and the way out.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ArtifactError, nearest
from .files import (
    ARTIFACT_FILE,
    STUDENT_FILE,
    atomic_file,
    atomic_folder,
    hash_files,
    hash_folder,
    refuse_foreign,
    sha256_file,
)
from .plan import StepPlan, plans_by_steps
from .schedule import NoiseSchedule
from .update import UpdateTable, update_table

__all__ = [
    "ARTIFACT_FILE",
    "STAGES",
    "STUDENT_FILE",
    "ArtifactManifest",
    "GraphSpec",
    "StudentManifest",
    "TensorSpec",
    "TokenizerSpec",
    "atomic_file",
    "atomic_folder",
    "hash_files",
    "hash_folder",
    "read_artifact_manifest",
    "read_student_manifest",
    "refuse_foreign",
    "sha256_file",
    "write_manifest",
]

STAGES = ("text_encoder", "denoiser", "decoder")
PIPELINE_FILE = "model_index.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(_Frozen):
    """One input or output of a graph; shape holds sizes, or the names of sizes free at run time such as "batch"."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphSpec(_Frozen):
    """One ONNX file, relative to the artifact folder."""

    file: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    opset: int = Field(ge=1)


class TokenizerSpec(_Frozen):
    """The tokenizer file, the length prompts are padded to, and the words the model has seen."""

    file: str
    context_length: int = Field(ge=1)
    known_words: list[str] = []


class StudentManifest(_Frozen):
    """`imagine_flash.json`: what diffusers' own files do not say about a student."""

    format: Literal["imagine-flash-student"] = "imagine-flash-student"
    format_version: Literal[1] = 1
    plans: dict[int, list[int]]
    noise_correction: bool
    recipe: dict[str, Any]
    teacher_sha256: str
    known_words: list[str] = []  # of the prompts it was distilled with; empty where they are too many to tell
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    @field_validator("plans")
    @classmethod
    def _plans_are_valid(cls, plans: dict[int, list[int]]) -> dict[int, list[int]]:
        plans_by_steps(plans, max((t for steps in plans.values() for t in steps), default=0) + 1)
        return plans

    @property
    def step_plans(self) -> dict[int, StepPlan]:
        """The plans by number of steps."""
        return {n: StepPlan(tuple(steps)) for n, steps in sorted(self.plans.items())}


class ArtifactManifest(_Frozen):
    """`manifest.json`: all that the runtime needs beside the graphs. It is refused unless every plan can be sampled."""

    format: Literal["imagine-flash-artifact"] = "imagine-flash-artifact"
    format_version: Literal[1] = 1
    name: str
    created_with: dict[str, str]
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"]
    scheduler: dict[str, Any]
    plans: dict[int, list[int]]
    noise_correction: bool
    latent_shape: list[int] = Field(min_length=3, max_length=3)  # C, H, W
    image_size: list[int] = Field(min_length=2, max_length=2)  # H, W
    scaling_factor: float = Field(gt=0)
    tokenizer: TokenizerSpec
    graphs: dict[str, GraphSpec]
    files: dict[str, str]
    parity: dict[str, dict[str, float]]
    student_sha256: str

    @field_validator("latent_shape", "image_size")
    @classmethod
    def _sizes_are_positive(cls, sizes: list[int]) -> list[int]:
        if min(sizes) < 1:
            raise ValueError(f"sizes must be >= 1, got {sizes}")
        return sizes

    @field_validator("files")
    @classmethod
    def _files_stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name, digest in files.items():
            if not _is_inside(name):
                raise ValueError(f"{name!r} leaves the folder; only plain relative paths are read")
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"the sha256 of {name!r} must be 64 hex digits, got {digest!r}")
        return files

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        self.update_tables()
        for stage in STAGES:
            if stage not in self.graphs:
                raise ValueError(f"the graph {stage!r} is missing")
        samplers = [f"sampler_{n}" for n in self.plans]
        for name in self.graphs:
            if name not in STAGES and name not in samplers:
                raise ValueError(f"unknown graph {name!r}{nearest(name, [*STAGES, *samplers])}")
        for name in [self.tokenizer.file, *(graph.file for graph in self.graphs.values())]:
            if name not in self.files:
                raise ValueError(f"{name!r} is used but has no sha256 in 'files'")
        return self

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the stored scheduler config."""
        return NoiseSchedule.from_scheduler_config(self.scheduler)

    @property
    def step_plans(self) -> dict[int, StepPlan]:
        """The plans by number of steps."""
        return plans_by_steps(self.plans, self.schedule.num_train_timesteps)

    def update_tables(self) -> dict[int, UpdateTable]:
        """The update's coefficients by number of steps."""
        schedule = self.schedule
        plans = plans_by_steps(self.plans, schedule.num_train_timesteps)
        correct = self.noise_correction
        return {n: update_table(schedule, p, self.prediction_type, noise_correction=correct) for n, p in plans.items()}


Manifest = TypeVar("Manifest", StudentManifest, ArtifactManifest)


def read_student_manifest(folder: str | Path) -> StudentManifest:
    """The manifest of a student folder. Raises ArtifactError."""
    folder = Path(folder)
    manifest = _read(folder, STUDENT_FILE, StudentManifest)
    if not (folder / PIPELINE_FILE).is_file():
        raise ArtifactError(
            f"{folder}: {PIPELINE_FILE} is missing, so it is no diffusers pipeline; copy the folder again"
        )
    return manifest


def read_artifact_manifest(folder: str | Path, verify: bool = True) -> ArtifactManifest:
    """The manifest of an artifact folder; with `verify` every listed file is read and hashed. Raises ArtifactError."""
    folder = Path(folder)
    manifest = _read(folder, ARTIFACT_FILE, ArtifactManifest)
    for name, digest in manifest.files.items():
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder}: {name} is missing; copy the folder again or run 'imagine-flash export' again"
            )
        if verify and sha256_file(folder / name) != digest:
            raise ArtifactError(
                f"{folder}: {name} differs from the sha256 in {ARTIFACT_FILE}: it is damaged or was changed; "
                "copy the folder again or run 'imagine-flash export' again"
            )
    return manifest


def write_manifest(folder: str | Path, manifest: StudentManifest | ArtifactManifest) -> Path:
    """Writes the manifest into its file in `folder` and returns the path."""
    path = Path(folder) / (STUDENT_FILE if isinstance(manifest, StudentManifest) else ARTIFACT_FILE)
    with atomic_file(path) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def _read(folder: Path, file: str, kind: type[Manifest]) -> Manifest:
    path = folder / file
    if not path.is_file():
        raise ArtifactError(_why_no_manifest(folder, file))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); copy the folder again") from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    expected = kind.model_fields["format"].default
    if not isinstance(raw, dict) or raw.get("format") != expected:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ArtifactError(f"{path}: 'format' must be {expected!r}, got {found!r}; is this the right folder?")
    version, known = raw.get("format_version"), kind.model_fields["format_version"].default
    if isinstance(version, int | float) and version > known and not math.isinf(version):
        raise ArtifactError(
            f"{path}: format_version {version} is newer than {known}, the newest this version reads; "
            "upgrade: pip install --upgrade imagine-flash"
        )
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {_first_problem(error, kind.model_fields)}") from None


def _why_no_manifest(folder: Path, file: str) -> str:
    if not folder.exists():
        return f"{folder} does not exist; check the path"
    if not folder.is_dir():
        return f"{folder} is not a folder; give the folder that holds {file}"
    if not any(folder.iterdir()):
        return f"{folder} is empty; it should hold {file}"
    if file == ARTIFACT_FILE and (folder / STUDENT_FILE).is_file():
        return f"{folder} is a student, not an artifact; run: imagine-flash export {folder} OUT"
    if file == STUDENT_FILE and (folder / ARTIFACT_FILE).is_file():
        return f"{folder} is an exported artifact, not a student; give the student folder it was exported from"
    if (folder / PIPELINE_FILE).is_file():
        then = " and then imagine-flash export OUT ARTIFACT" if file == ARTIFACT_FILE else ""
        return f"{folder} is a diffusers pipeline without {file}; run: imagine-flash distill {folder} OUT{then}"
    return f"{folder} holds no {file}; it is neither a student nor an artifact of imagine-flash"


def _first_problem(error: ValidationError, known: Iterable[str]) -> str:
    """The first complaint as 'field: what; way out', on one line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown field {field!r}{nearest(field, known)}"
    if first["type"] == "missing":
        return f"the field {field!r} is missing; export or copy the folder again"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {str(first['input'])[:80]!r}"


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name and "\\" not in name and ":" not in name and "\0" not in name
    return bool(plain) and not path.is_absolute() and ".." not in path.parts and name == path.as_posix() and name != "."
