"""`imagine-flash export`: a student becomes an artifact folder, or nothing is written."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from filelock import FileLock, Timeout

from ..core.errors import ArtifactError, ParityError
from ..core.plan import plans_by_steps, select
from ..core.schedule import NoiseSchedule
from ..core.update import update_table
from ..folders.files import ARTIFACT_FILE, atomic_folder, cache_folder, hash_files, hash_folder
from ..folders.manifests import IMAGE_ENCODER, STAGES, ArtifactManifest, Plans, Size, StudentManifest, graph_name
from ..folders.reading import read_student_manifest, signed, write_manifest
from ..pipelines.loading import load_stages, student_folder
from ..pipelines.lora import fused_records
from ..pipelines.stages import IMAGES, LATENTS, Stages
from .cases import Case, Sampling
from .ledger import Ledger
from .onnx import StageGraph, export_decoder, export_denoiser, export_image_encoder, export_text_encoder, save_graph
from .options import ExportOptions
from .parity import SEEDS, check_parity, check_tokenizers, make_cases
from .precision import emulate, find_islands, lower
from .report import save_references, write_report
from .sampler_graph import sampler_graph
from .sessions import give_back_memory, is_large
from .tokenizer import parity_prompts, write_tokenizers
from .weights import WEIGHTS_FILE, WeightStore

VERSIONED = ("imagine-flash", "torch", "diffusers", "transformers", "onnx", "onnxscript")
CHECKED = ".check-"  # graphs that stand for the artifact's own in the gate, where those do not compute as on a GPU
Progress = Callable[[str], None]
Graphs = dict[str, StageGraph]


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


@dataclass(frozen=True)
class _Traced:
    """What is left of the networks once they are graphs: torch's memory is free before the first graph runs."""

    stages: Graphs  # float32; by the manifest's names
    cases: list[Case]
    sampling: Sampling
    facts: dict[str, Any]  # fields of the manifest


def _export(
    student: str | Path, out: Path, options: ExportOptions, tell: Callable[[str, int], None]
) -> ArtifactManifest:
    folder = student_folder(student)
    described = read_student_manifest(folder)
    total = _count(options, len(options.steps or described.plans))

    def progress(what: str) -> None:
        tell(what, total)

    with atomic_folder(out, replaces=(ARTIFACT_FILE,)) as target, torch.inference_mode():
        store = WeightStore(target / WEIGHTS_FILE)
        traced = _trace(folder, target, described, store, options, progress)
        if is_large(store.path):
            give_back_memory()
        stages = _lowered(traced, store, options, progress)
        whole = options.forms != "stages"  # what is not asked for is neither built nor checked
        graphs = stages | (_samplers(stages, traced) if whole else {})
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
        manifest = signed(_finish(target, manifest, ledger, traced.cases, options, progress))
        write_manifest(target, manifest)
    return manifest


def _trace(
    folder: Path,
    target: Path,
    described: StudentManifest,
    store: WeightStore,
    options: ExportOptions,
    progress: Progress,
) -> _Traced:
    """Torch's part: the networks' answers and their graphs."""
    progress("loading the student")
    stages = load_stages(
        folder, tiny_decoder=options.tiny_decoder, loras=options.loras, keep_half=True, variant=options.variant
    )
    sizes = options.sizes or (stages.default_size,)
    for size in sizes:
        stages.check_size(size)
    sampling, plans = _sampling(described, stages, options)
    prompts = list(options.prompts or parity_prompts(stages))
    facts = {
        "pipeline": stages.pipeline,
        "precision": options.precision,
        "prediction_type": stages.prediction_type,
        "scheduler": _plain(stages.scheduler),
        "plans": plans,
        "noise_correction": described.noise_correction,
        "sampler": described.sampler,
        "guidance": described.guidance,
        "default_steps": described.default_steps if described.default_steps in plans else None,
        "sources": described.sources,
        "latent_channels": stages.latent_channels,
        "downscale": stages.downscale,
        "sizes": list(sizes),
        "batch": options.batch,
        "scaling_factor": stages.decoder.scaling_factor,
        "vocabulary": described.vocabulary,
        "tokenizers": write_tokenizers(target, stages, described.known_words),
        "created_with": {package: version(package) for package in VERSIONED} | {"onnxruntime": onnxruntime.__version__},
        "loras": [record for lora in options.loras for record in fused_records(lora)],
        "limits": {name: value for name, value in asdict(options.limits).items() if math.isfinite(value)},
    }
    check_tokenizers(target, facts["tokenizers"], stages, prompts)
    gated = {steps: table for steps, table in sampling.tables.items() if options.gated in (None, steps)}
    cases = make_cases(stages, replace(sampling, tables=gated), sizes, sorted({*options.batch}), prompts, progress)
    return _Traced(_stage_graphs(stages, store, sizes, options, progress), cases, sampling, facts)


def _stage_graphs(
    stages: Stages, store: WeightStore, sizes: tuple[Size, ...], options: ExportOptions, progress: Progress
) -> Graphs:
    progress("writing text_encoder")
    graphs = {"text_encoder": export_text_encoder(stages, store, opset=options.opset)}
    kinds = {"denoiser": export_denoiser, "decoder": export_decoder, IMAGE_ENCODER: export_image_encoder}
    for kind, export in list(kinds.items())[: 3 if options.with_image_encoder else 2]:
        for size in sizes:
            name = graph_name(kind, size, sizes[0])
            progress(f"writing {name}")
            graphs[name] = export(stages, store, size, opset=options.opset)
    return graphs


def _samplers(stages: Graphs, traced: _Traced) -> Graphs:
    """The whole-sampler graphs of every size and plan, from token ids and from embeddings."""
    graphs, sizes = {}, traced.facts["sizes"]
    for size in sizes:
        denoiser, decoder = (stages[graph_name(kind, size, sizes[0])] for kind in ("denoiser", "decoder"))
        for steps, table in traced.sampling.tables.items():
            times = traced.sampling.schedule.network_time(table.timesteps)
            for kind, text in (
                (f"sampler_{steps}", stages["text_encoder"]),
                (f"sampler_{steps}_from_embeddings", None),
            ):
                graph = sampler_graph(denoiser, decoder, table, times, text_encoder=text)
                graphs[graph_name(kind, size, sizes[0])] = graph
    return graphs


def _lowered(traced: _Traced, store: WeightStore, options: ExportOptions, progress: Progress) -> Graphs:
    """The stage graphs in the precision asked for."""
    if options.precision == "fp32":
        return traced.stages
    graphs = {}
    for name, graph in traced.stages.items():
        progress(f"lowering {name}")
        feeds = [_feed(name, case, traced) for case in traced.cases if _is_of(name, case, traced)]
        islands = find_islands(graph, store, options.precision, feeds, limit=options.limits.rms / 2)
        graphs[name] = lower(graph, store, options.precision, islands.modules)
    moved = store.keep(ref for graph in graphs.values() for ref in graph.weights.values())

    def at_its_place(graph: StageGraph) -> StageGraph:
        weights = {name: replace(ref, offset=moved[ref.offset]) for name, ref in graph.weights.items()}
        return replace(graph, weights=weights)

    return {name: at_its_place(graph) for name, graph in graphs.items()}


def _is_of(name: str, case: Case, traced: _Traced) -> bool:
    """One case per stage graph and seed: that of the smallest batch at the graph's size."""
    default, smallest = traced.facts["sizes"][0], traced.facts["batch"][0]
    at_its_size = name in {graph_name(kind, case.size, default) for kind in (*STAGES, IMAGE_ENCODER)}
    return at_its_size and len(case.prompts) == smallest


def _feed(name: str, case: Case, traced: _Traced) -> dict[str, Any]:
    """What torch gave the stage in this case, as arrays by input name: of the longest plan, its noisiest step."""
    longest = max(case.walks)
    if name == "text_encoder":
        return {key: ids.numpy() for key, ids in case.tokens.items()}
    for stage, key, given in (("decoder", LATENTS, case.latents), (IMAGE_ENCODER, IMAGES, case.images)):
        if name.startswith(stage):
            return {key: given[longest].numpy()}
    x, t, _ = case.walks[longest][0]
    values = [x, t, *case.conditions, *case.told]
    names = [value.name for value in traced.stages[name].graph.input]
    return {key: value.numpy() for key, value in zip(names, values, strict=True)}


def _gate(
    target: Path,
    manifest: ArtifactManifest,
    stages: Graphs,
    traced: _Traced,
    options: ExportOptions,
    progress: Progress,
) -> Ledger:
    """Every graph against torch. Lowered graphs are checked by their emulation, since onnxruntime's CPU provider does not
    compute fp16 as a GPU does and bf16 not at all; those of fp16 must also run there."""
    limits, paths = options.limits, {name: target / spec.file for name, spec in manifest.graphs.items()}
    if manifest.precision == "fp32":
        return check_parity(paths, manifest, traced.cases, limits, progress)
    emulated = {name: emulate(graph) for name, graph in stages.items()}
    checked = {name: target / f"{CHECKED}{name}.onnx" for name in paths}
    for name, graph in (emulated | (_samplers(emulated, traced) if options.forms != "stages" else {})).items():
        save_graph(graph, checked[name])
    try:
        ledger = check_parity(checked, manifest, traced.cases, limits, progress)
        if manifest.precision == "fp16":
            ledger.failures += check_parity(paths, manifest, traced.cases[:1], limits, lambda what: None).failures
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
        whole = name.startswith("sampler_")
        if options.forms != "both" and whole != (options.forms == "whole-sampler"):
            (target / graphs.pop(name).file).unlink()
    references = save_references(target, cases)
    errors = {name: found for name, found in ledger.errors.items() if name in graphs or name.startswith("stages_")}
    update = {"graphs": graphs, "parity": errors, "references": references}
    manifest = manifest.model_copy(update=update)
    formats = {}
    for kind in options.formats:
        if kind != "onnx":
            progress(f"writing {kind}")
            formats[kind] = _write_format(kind, target, manifest, options)
    complete = manifest.model_copy(update={"formats": formats, "files": hash_files(target)})
    return ArtifactManifest.model_validate(complete.model_dump())


def _write_format(kind: str, target: Path, manifest: ArtifactManifest, options: ExportOptions) -> dict[str, Any]:
    if kind == "tensorrt":
        from .tensorrt import write_tensorrt

        return write_tensorrt(target, manifest)
    if kind == "openvino":
        from .openvino import write_openvino

        return write_openvino(target, manifest, int8=options.int8)
    from .triton_repository import write_triton_repository

    return write_triton_repository(target, manifest)


def _sampling(described: StudentManifest, stages: Stages, options: ExportOptions) -> tuple[Sampling, Plans]:
    """The plans asked for: coefficients and schedule, and the timesteps by number of steps."""
    schedule = NoiseSchedule.from_scheduler_config(stages.scheduler)
    plans = plans_by_steps(described.plans, schedule.num_train_timesteps)
    if options.steps is not None:
        plans = {steps: select(plans, steps) for steps in sorted(options.steps)}
    how: dict[str, Any] = {"noise_correction": described.noise_correction, "sampler": described.sampler}
    tables = {n: update_table(schedule, plan, stages.prediction_type, **how) for n, plan in plans.items()}
    return Sampling(tables, schedule), {n: list(plan) for n, plan in plans.items()}


def _count(options: ExportOptions, plans: int) -> int:
    """How many things an export tells that it does."""
    sizes = len(options.sizes or [1])
    stages = 1 + (2 + options.with_image_encoder) * sizes
    cases = sizes * len({*options.batch}) * len(SEEDS)
    graphs = stages + (0 if options.forms == "stages" else 2 * plans * sizes)
    lowered = 0 if options.precision == "fp32" else stages
    return 1 + cases + stages + lowered + graphs + sum(kind != "onnx" for kind in options.formats)


def _failure(out: Path, ledger: Ledger) -> ParityError:
    report = out.with_name(f"{out.name}.parity")
    write_report(report, ledger)
    others = len(ledger.failures) - 1
    more = f" and {others} more" if others else ""
    return ParityError(f"{ledger.failures[0].message}{more}; nothing was written to {out}; see {report}")


def _plain(config: dict) -> dict:
    """The scheduler config without private keys (but for the class name), which may hold paths."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
