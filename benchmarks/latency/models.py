"""The models that latency is measured on: a folder with its student beside it, or a well-known shape with random weights."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psutil import virtual_memory

from ...core.errors import ImagineFlashError, nearest
from ...engine.loading import EMBEDDED
from ...folders.files import ARTIFACT_FILE, STUDENT_FILE
from ...folders.manifests import ArtifactManifest, Size, size_name
from ...folders.reading import read_artifact_manifest, read_student_manifest
from ..processes import COMMAND

# name -> what random_students calls it, billions of parameters, sizes that it was made for
SHAPES: dict[str, tuple[str, float, Size]] = {
    "tiny-shape": ("tiny", 0.002, (64, 64)),
    "sd15-shape": ("sd15", 1.07, (512, 512)),
    "sd-turbo-shape": ("sd-turbo", 1.29, (512, 512)),
    "pixart-shape": ("pixart", 5.5, (512, 512)),
    "sdxl-turbo-shape": ("sdxl", 3.47, (512, 512)),
}
EXPORT_BYTES = 7.2  # a parameter, at most: docs/results/export_sd_turbo.json
DRAW_BYTES = 11.0  # of two processes that draw, one of them in float32 torch


@dataclass(frozen=True, kw_only=True)
class Model:
    """An artifact, and the student that it was exported from, which other libraries draw with; None where there is none."""

    name: str
    artifact: Path
    student: Path | None
    manifest: ArtifactManifest


def find_model(
    model: str,
    folder: Path,
    *,
    decoder: str,
    steps: Sequence[int],
    sizes: Sequence[Size],
    batch: int,
    int8: bool = False,
) -> Model:
    """What --model means. A shape is made in `folder`, with int8 in 8 bits too, or taken from there.

    Raises ImagineFlashError for an unknown name, for what the artifact does not have, and for a shape that this machine's
    memory does not hold, before anything is made."""
    if model in SHAPES:
        return _shape(model, folder / f"{model}-{decoder}", decoder, steps, sizes, batch, int8)
    artifact = EMBEDDED if model == "embedded" else Path(model)
    if not (artifact / ARTIFACT_FILE).is_file() and not artifact.exists():
        known = ["embedded", *SHAPES]
        raise ImagineFlashError(f"no model {model!r}{nearest(model, known)}; give an artifact, or {', '.join(known)}")
    manifest = read_artifact_manifest(artifact)
    student = artifact.resolve().parent / "student"
    there = (student / STUDENT_FILE).is_file() and read_student_manifest(student).plans == manifest.plans
    return Model(name=manifest.name, artifact=artifact, student=student if there else None, manifest=manifest)


def refuse_too_large(model: str) -> None:
    """Raises ImagineFlashError where this machine's free memory does not hold a shape."""
    billions = SHAPES[model][1]
    needed, free = billions * 1e9 * max(EXPORT_BYTES, DRAW_BYTES) / 2**30, virtual_memory().available / 2**30
    if needed > free:
        raise ImagineFlashError(
            f"{model} has {billions:g} billion parameters, and its benchmark needs about {needed:.0f} GiB of memory; "
            f"{free:.0f} GiB are free; take a smaller shape ({', '.join(SHAPES)})"
        )


def _shape(
    model: str, folder: Path, decoder: str, steps: Sequence[int], sizes: Sequence[Size], batch: int, int8: bool
) -> Model:
    kind, _, own = SHAPES[model]
    refuse_too_large(model)
    student, artifact, sizes = folder / "student", folder / "artifact", list(sizes) or [own]
    if not (student / STUDENT_FILE).is_file():
        from ..random_students import random_student

        student.mkdir(parents=True, exist_ok=True)
        random_student(student, kind, steps=(1, 2, 4), tiny_decoder=decoder == "tiny")  # type: ignore[arg-type]
    if not _holds(artifact, steps, sizes, batch, int8):
        options = ["--stages", "--no-image-encoder", "--steps", ",".join(map(str, steps)), "--batch", f"1-{batch}"]
        options += ["--sizes", ",".join(map(size_name, sizes)), "--name", model]
        options += ["--format", "openvino", "--int8", "full"] if int8 else []
        ended = subprocess.run(
            [*COMMAND, "export", str(student), str(artifact), *options], capture_output=True, text=True
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ImagineFlashError(f"the export of {model} ended with {ended.returncode}: {last}")
    return Model(name=model, artifact=artifact, student=student, manifest=read_artifact_manifest(artifact))


def _holds(artifact: Path, steps: Sequence[int], sizes: Sequence[Size], batch: int, int8: bool) -> bool:
    if not (artifact / ARTIFACT_FILE).is_file():
        return False
    manifest = read_artifact_manifest(artifact, verify=False)
    here = set(steps) <= set(manifest.plans) and set(sizes) <= set(manifest.sizes) and batch <= manifest.batch[1]
    return here and manifest.holds_int8 >= int8
