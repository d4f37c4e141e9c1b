"""Reading and writing the manifests of the two folders this project writes, without trusting them.

Reading raises ArtifactError with one line that names the folder, the field or file, and the way out.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..core.errors import ArtifactError, nearest
from .files import ARTIFACT_FILE, STUDENT_FILE, atomic_file, known_sha256
from .manifests import LORA_FILE, PIPELINE_FILE, ArtifactManifest, StudentManifest

DIGEST = "sha256"  # the manifest's field
# that a runtime reads; TensorRT plans are made later and have names of their own
GRAPH_FILES = (".onnx", ".bin", ".data", ".xml")

Manifest = TypeVar("Manifest", StudentManifest, ArtifactManifest)


def read_student_manifest(folder: str | Path) -> StudentManifest:
    """The manifest of a student folder. Raises ArtifactError."""
    folder = Path(folder)
    manifest = _read(folder, STUDENT_FILE, StudentManifest)
    needed, kind = PIPELINE_FILE, "diffusers pipeline"
    if manifest.base is not None:  # whichever name its file has
        needed = next((file.name for file in folder.rglob("*.safetensors")), LORA_FILE)
        kind = f"LoRA of {manifest.base}"
    if not any(folder.rglob(needed)):
        raise ArtifactError(f"{folder}: {needed} is missing, so it is no {kind}; copy the folder again")
    return manifest


def read_artifact_manifest(folder: str | Path, verify: bool = True) -> ArtifactManifest:
    """The manifest of an artifact folder; with `verify` every listed file is hashed, once a process. Raises ArtifactError."""
    folder = Path(folder)
    manifest = _read(folder, ARTIFACT_FILE, ArtifactManifest)
    _check_nothing_is_unlisted(folder, manifest)
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(
                f"{folder}: {name} is missing; copy the folder again or run 'imagine-flash export' again"
            )
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(
                f"{folder}: {name} is a link that leads out of the folder; copy the file itself, or give the hub id"
            )
        if verify and known_sha256(path) != digest:
            raise ArtifactError(
                f"{folder}: {name} differs from the sha256 in {ARTIFACT_FILE}: it is damaged or was changed; "
                "copy the folder again or run 'imagine-flash export' again"
            )
    return manifest


def _check_nothing_is_unlisted(folder: Path, manifest: ArtifactManifest) -> None:
    """Graphs name further files, which a runtime would load: every file of that kind must be listed, and so hashed."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in GRAPH_FILES and path.is_file() and name not in manifest.files:
            raise ArtifactError(
                f"{folder}: {name} is not listed in {ARTIFACT_FILE}, so its hash cannot be checked; remove it or export again"
            )


def write_manifest(folder: str | Path, manifest: StudentManifest | ArtifactManifest) -> Path:
    """Writes the manifest into its file in `folder` and returns the path."""
    path = Path(folder) / (STUDENT_FILE if isinstance(manifest, StudentManifest) else ARTIFACT_FILE)
    if isinstance(manifest, ArtifactManifest):
        manifest = with_digest(manifest)
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
        manifest = kind.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error, kind.model_fields)}") from None
    if DIGEST in kind.model_fields and raw.get(DIGEST) != digest_of(raw):
        raise ArtifactError(
            f"{path} was changed after the export (its sha256 is another): it no longer says how the pictures were checked; "
            "run 'imagine-flash export' again"
        )
    return manifest


def with_digest(manifest: ArtifactManifest) -> ArtifactManifest:
    """The manifest with the digest of its other fields."""
    return manifest.model_copy(update={DIGEST: digest_of(json.loads(manifest.model_dump_json()))})


def digest_of(values: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's fields, but for the digest itself: plans, prediction type and schedule are bound by it."""
    rest = {name: value for name, value in values.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of one of diffusers' own JSON files. Raises ArtifactError."""
    if not path.parent.is_dir():
        raise ArtifactError(f"no folder {path.parent}; give a diffusers pipeline folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot read {path}: {reason}; is {path.parent} part of a diffusers pipeline?") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values


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
        distil = f"imagine-flash distill {folder} OUT"
        if file == STUDENT_FILE:
            return f"{folder} is a diffusers pipeline without {file}; run: {distil}"
        return (
            f"{folder} is a diffusers pipeline without {file}; if it draws in few steps, run: imagine-flash export {folder} OUT "
            f"--steps N; else: {distil}, and export that"
        )
    return f"{folder} holds no {file}; it is neither a student nor an artifact of imagine-flash"


def first_problem(error: ValidationError, known: Iterable[str]) -> str:
    """The first complaint as 'field: what; way out', on one line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("int", "float"))  # of a union
    if first["type"] == "extra_forbidden":
        return f"unknown field {field!r}{nearest(field, known)}"
    if first["type"] == "missing":
        return f"the field {field!r} is missing; export or copy the folder again"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {str(first['input'])[:80]!r}"
