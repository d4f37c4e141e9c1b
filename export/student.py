"""`imagine-flash export`: a student becomes an artifact folder, or nothing is written."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..core.errors import ArtifactError, ParityError
from ..folders.cache import check_room
from ..folders.files import ARTIFACT_FILE, atomic_folder, cache_folder, hash_files, hash_folder
from ..folders.manifests import WHOLE_SAMPLER, ArtifactManifest
from ..folders.reading import read_student_manifest, with_digest, write_manifest
from ..models.control import is_controlled
from ..models.files import weights_files
from ..pipelines.loading import student_folder
from .cases import Case
from .ledger import LIMITS, Ledger
from .onnx import save_graph
from .options import ExportOptions
from .parity import SEEDS, check_parity
from .precision import emulate
from .report import save_references, write_report
from .sessions import give_back_memory, is_large
from .tracing import FURTHER, Graphs, Progress, Traced, lowered, samplers, trace
from .weights import WEIGHTS_FILE, WeightStore

CHECKED = ".check-"  # graphs that stand for the artifact's own in the gate, where those do not compute as on a GPU


def export_student(
    student: str | Path,
    out: str | Path,
    *,
    options: ExportOptions | None = None,
    progress: Callable[[str, int], None] = lambda what, total: None,
) -> ArtifactManifest:
    """Exports a student (folder or hub id) to the artifact folder `out` and returns its manifest.

    Writes text_encoder, denoiser, decoder and sampler graphs (ONNX), weights.bin, tokenizers, reference pictures, the
    other formats asked for, and manifest.json in one rename, after every graph agreed with torch; an artifact that was
    at `out` stays whole until then. progress is told what is being done and how many such things there are. Raises
    ArtifactError, PlanError, ScheduleError, MissingExtraError; ParityError with a report and the failing images in the
    folder `out`.parity.
    """
    options, out = options or ExportOptions(), Path(out)
    try:
        with FileLock(_lock_of(out), timeout=0):
            return _export(student, out, options, progress)
    except Timeout:
        raise ArtifactError(f"another export is writing {out}; wait for it or choose another folder") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ArtifactError(f"cannot write {out}: {reason}; nothing was changed there") from error


def _lock_of(out: Path) -> Path:
    """A file that stays: who removes a lock may remove the one that another process has just taken."""
    folder = cache_folder("locks") or Path(tempfile.gettempdir())
    return folder / f"{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:32]}.lock"


def _export(
    student: str | Path, out: Path, options: ExportOptions, tell: Callable[[str, int], None]
) -> ArtifactManifest:
    if "openvino" in options.formats:  # what is not installed is said before the work
        from .openvino import import_libraries

        import_libraries(options.int8)
    folder = student_folder(student)
    described = read_student_manifest(folder)
    copies = 1.2 + (options.precision != "fp32") + sum(kind != "onnx" for kind in options.formats)
    size = sum(file.stat().st_size for file in weights_files(folder))
    check_room(out, int(size * copies), f"the export of {folder.name}")
    total = _count(options, len(options.steps or described.plans), is_controlled=is_controlled(folder))

    def progress(what: str) -> None:
        tell(what, total)

    with atomic_folder(out, replaces=(ARTIFACT_FILE,)) as target, torch.inference_mode():
        store = WeightStore(target / WEIGHTS_FILE)
        traced = trace(folder, target, described, store, options, progress)
        if is_large(store.path):
            give_back_memory()
        stages = lowered(traced, store, options, progress)
        whole = options.forms != "stages"  # what is not asked for is neither built nor checked
        graphs = stages | (samplers(stages, traced) if whole else {})
        specs = {name: save_graph(graph, target / f"{name}.onnx") for name, graph in graphs.items()}
        manifest = ArtifactManifest(
            name=options.name or folder.resolve().name,
            student_sha256=hash_folder(folder),
            graphs=specs,
            files=hash_files(target),
            parity={},
            **traced.facts,
        )
        ledger = _gate(target, manifest, stages, traced, options, progress)
        if ledger.failures:
            raise _failure(out, ledger)
        manifest = with_digest(_finish(target, manifest, ledger, traced.cases, options, progress))
        write_manifest(target, manifest)
    return manifest


def _gate(
    target: Path, manifest: ArtifactManifest, stages: Graphs, traced: Traced, options: ExportOptions, progress: Progress
) -> Ledger:
    """Every graph against torch. Lowered graphs are checked by their emulation, since onnxruntime's CPU provider does not
    compute fp16 as a GPU does and bf16 not at all; those of fp16 must also run there."""
    limits, paths = options.limits, {name: target / spec.file for name, spec in manifest.graphs.items()}
    if manifest.precision == "fp32":
        return check_parity(paths, manifest, traced.cases, limits, progress)
    emulated = {name: emulate(graph) for name, graph in stages.items()}
    checked = {name: target / f"{CHECKED}{name}.onnx" for name in paths}
    for name, graph in (emulated | (samplers(emulated, traced) if options.forms != "stages" else {})).items():
        save_graph(graph, checked[name])
    try:
        ledger = check_parity(checked, manifest, traced.cases, limits, progress)
        if manifest.precision == "fp16":
            ledger.failures += check_parity(paths, manifest, traced.cases[:1], limits, half=True).failures
    finally:
        for path in checked.values():
            path.unlink(missing_ok=True)
    return ledger


def _finish(
    target: Path,
    manifest: ArtifactManifest,
    ledger: Ledger,
    cases: list[Case],
    options: ExportOptions,
    progress: Progress,
) -> ArtifactManifest:
    """Reference pictures, the other formats, and the manifest with everything's hash."""
    graphs = dict(manifest.graphs)
    for name in list(graphs):
        whole = name.startswith(WHOLE_SAMPLER)
        if options.forms != "both" and whole != (options.forms == "whole-sampler"):
            (target / graphs.pop(name).file).unlink()
    references = save_references(target, cases, is_controlled=manifest.control is not None)
    errors = {name: found for name, found in ledger.errors.items() if name in graphs or name.startswith("stages_")}
    update = {"graphs": graphs, "parity": errors, "references": references}
    manifest = manifest.model_copy(update=update)
    formats = {}
    for kind in options.formats:
        if kind != "onnx":
            progress(f"writing {kind}")
            formats[kind] = _write_format(kind, target, manifest, options, cases)
    complete = manifest.model_copy(update={"formats": formats, "files": hash_files(target)})
    return ArtifactManifest.model_validate(complete.model_dump())


def _write_format(
    kind: str, target: Path, manifest: ArtifactManifest, options: ExportOptions, cases: list[Case]
) -> dict[str, Any]:
    if kind == "tensorrt":
        from .tensorrt import write_tensorrt

        return write_tensorrt(target, manifest)
    if kind == "openvino":
        from .openvino import write_openvino

        limit = options.psnr or LIMITS["int8"].psnr
        return write_openvino(target, manifest, int8=options.int8, cases=cases, prompts=options.prompts, psnr=limit)
    from .triton_repository import write_triton_repository

    return write_triton_repository(target, manifest)


def _count(options: ExportOptions, plans: int, *, is_controlled: bool) -> int:
    """How many things an export tells that it does."""
    sizes, free = len(options.sizes or [1]), options.any_size is not None
    stages = 1 + (2 + options.with_image_encoder + is_controlled) * (1 if free else sizes)
    cases = (sizes + FURTHER * free) * len({*options.batch}) * len(SEEDS)
    graphs = stages + (0 if options.forms == "stages" or is_controlled or free else 2 * plans * sizes)
    lowered = 0 if options.precision == "fp32" else stages
    return 1 + cases + stages + lowered + graphs + sum(kind != "onnx" for kind in options.formats)


def _failure(out: Path, ledger: Ledger) -> ParityError:
    report = out.resolve()  # "." has no name
    report = report.with_name(f"{report.name}.parity")
    write_report(report, ledger)
    others = len(ledger.failures) - 1
    more = f" and {others} more" if others else ""
    return ParityError(f"{ledger.failures[0].message}{more}; nothing was written to {out}; see {report}")
