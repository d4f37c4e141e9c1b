"""What `generate` and `serve` do with a model that is no artifact yet: describe it, export it once into the cache, say so."""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ImagineFlashError, PlanError, missing_extra
from .common import note, progress_bar, say_sources

if TYPE_CHECKING:
    from ..models.options import ModelOptions

STUDENT_BACKENDS = ("torch", "torch-compile", "torch-graph")
GPU = "/dev/nvidiactl"


def ready(
    model: str | Path | None,
    options: ModelOptions,
    backend: str,
    *,
    device: str = "auto",
    steps: int | None = None,
    quality: bool = False,
    base: str | None = None,
    swaps: bool = False,
) -> Path | None:
    """The folder to load: of an artifact, or of a student where torch draws with it. None is the embedded model.

    steps: that will be asked for, of a model that does not say for how many it was trained. quality: the model's own decoder,
    where on a CPU a tiny one would be taken. base: whose configs a single file is read with. swaps: LoRAs will be, which torch
    does without an export, unless another backend is named. Raises ImagineFlashError.
    """
    from ..folders.files import ARTIFACT_FILE, STUDENT_FILE
    from ..folders.reading import read_student_manifest
    from ..models.catalogue import find
    from ..models.student import check_left_out, is_made, student_of

    if model is None:
        if options.tiny_decoder is not None:
            raise ImagineFlashError("the embedded model has one decoder; --tiny-decoder goes with --model")
        if options.controlnet is not None:
            raise ImagineFlashError("the embedded model was exported without one; --controlnet goes with --model")
        if base is not None:
            raise ImagineFlashError(f"--base {base}: the embedded model is whole; --base goes with a file as --model")
        check_left_out(options, "the embedded model")
        return None
    if Path(model).is_file() or base is not None:
        from ..pipelines.single_file import unpacked

        model = unpacked(model, base=base, entry=options.entry)
    given = Path(model)
    is_changed = options.tiny_decoder is not None or options.controlnet is not None
    if ((given / ARTIFACT_FILE).is_file() or (given / STUDENT_FILE).is_file()) and not is_changed:
        check_left_out(options, str(model))
        return given  # a student of ours runs in torch, unless it is exported by name
    entry = None if given.exists() else find(str(model), steps)
    if entry is not None and entry is not find(str(model)):
        model = entry.name  # a repository has an entry for each number of steps
    unknown = options.entry is None and entry is None
    if steps is not None and options.timesteps is None and (unknown or options.any_steps):
        options = options.model_copy(update={"steps": (steps,)})
    if not quality and options.tiny_decoder is None and on_cpu(device):
        options = options.model_copy(update={"prefer_tiny": True})
    student = student_of(model, options)
    if not is_made(student):
        return student  # an artifact or a student of ours on the hub, as a folder of it
    say_sources(student)
    plans = read_student_manifest(student).plans
    if steps is not None and steps not in plans:
        raise PlanError(
            f"steps must be {', '.join(map(str, sorted(plans)))} for {student.name}, got {steps}; it was trained for no other; "
            "--any-steps draws anyway"
        )
    runs_in_torch = backend in STUDENT_BACKENDS or (swaps and backend == "auto")
    return student if runs_in_torch else _exported(student)


def on_cpu(device: str) -> bool:
    """Whether a picture would be drawn by the processor."""
    return device == "cpu" or (device == "auto" and not os.path.exists(GPU))


def _exported(student: Path) -> Path:
    """The student's export in the cache, made if it is not there. Named by the student's content and what draws it."""
    from ..folders.cache import export_folder, mark_used
    from ..folders.files import ARTIFACT_FILE, CACHE_VARIABLE
    from ..folders.reading import read_student_manifest

    target = export_folder(student.parent.name, student.name)
    if target is None:
        raise ImagineFlashError(f"there is no cache to export into; set {CACHE_VARIABLE}, or run: imagine-flash export")
    if (target / ARTIFACT_FILE).is_file():
        mark_used(target)
        return target
    if importlib.util.find_spec("onnxscript") is None:
        raise missing_extra("onnxscript", "export")
    from ..export import ExportOptions, export_student

    manifest = read_student_manifest(student)
    options = ExportOptions(batch=(1, 2), forms="stages", gated=manifest.default_steps or max(manifest.plans))
    note(f"exporting {student.name} once into {target}; the next run starts from there")
    say_needs(student)
    target.parent.mkdir(exist_ok=True)
    with progress_bar() as progress:
        export_student(student, target, options=options, progress=progress)
    return target


def say_needs(student: Path) -> None:
    """How long an export may take and, where this machine has less memory than it may take, what would fit."""
    from ..models.files import count_parameters, weights_files
    from ..models.machine import MINUTES_PER_BILLION, advice

    with suppress(OSError, ValueError):  # a damaged file: loading says so
        parameters = count_parameters(weights_files(student))
        if parameters > 1e8:
            minutes = MINUTES_PER_BILLION * parameters / 1e9
            note(f"{parameters / 1e9:.2f} G parameters: two cores need up to {minutes:.0f} minutes")
        if (problem := advice(parameters)) is not None:
            note(f"note: {problem}")
