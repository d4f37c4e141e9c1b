"""What `generate` and `serve` do with a model that is no artifact yet: describe it, export it once into the cache, say so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ImagineFlashError, missing_extra
from .common import note, say_sources

if TYPE_CHECKING:
    from ..models.describe import ModelOptions

STUDENT_BACKENDS = ("torch", "torch-compile", "torch-graph")


def ready(model: str | Path | None, options: ModelOptions, backend: str, *, steps: int | None = None) -> Path | None:
    """The folder to load: of an artifact, or of a student where torch draws with it. None is the embedded model.

    steps: that will be asked for, of a model that does not say for how many it was trained. Raises ImagineFlashError.
    """
    from ..folders.files import ARTIFACT_FILE, STUDENT_FILE
    from ..models.student import student_of

    if model is None:
        return None
    given = Path(model)
    if (given / ARTIFACT_FILE).is_file() or (given / STUDENT_FILE).is_file():
        return given  # a student of ours runs in torch, unless it is exported by name
    own = options.timesteps is not None
    plain = given.is_dir() and options.entry is None
    if steps is not None and not own and (plain or options.any_steps):
        options = options.model_copy(update={"steps": (steps,)})
    student = student_of(model, options)
    if (student / ARTIFACT_FILE).is_file():
        return student
    say_sources(student)
    return student if backend in STUDENT_BACKENDS else _exported(student)


def _exported(student: Path) -> Path:
    """The student's export in the cache, made if it is not there. Named by the student's content and what draws it."""
    from importlib.metadata import version

    from ..folders.files import ARTIFACT_FILE, CACHE_VARIABLE, cache_folder
    from ..folders.reading import read_student_manifest

    cache = cache_folder("exports")
    if cache is None:
        raise ImagineFlashError(f"there is no cache to export into; set {CACHE_VARIABLE}, or run: imagine-flash export")
    target = cache / f"{student.parent.name}-{version('imagine-flash')}" / student.name
    if (target / ARTIFACT_FILE).is_file():
        return target
    if importlib.util.find_spec("onnxscript") is None:
        raise missing_extra("onnxscript", "export")
    from ..export import ExportOptions, export_student
    from .exporting import progress_bar

    manifest = read_student_manifest(student)
    options = ExportOptions(batch=(1, 2), forms="stages", gated=manifest.default_steps or max(manifest.plans))
    note(f"exporting {student.name} once into {target}; the next run starts from there")
    target.parent.mkdir(exist_ok=True)
    with progress_bar() as progress:
        export_student(student, target, options=options, progress=progress)
    return target
