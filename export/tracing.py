"""The networks of a student as graphs: torch's answers and ONNX, in the precision asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime

from ..core.errors import ArtifactError
from ..core.plan import plans_by_steps, select
from ..core.schedule import NoiseSchedule
from ..core.update import update_table
from ..folders.manifests import CONDITION_ENCODER, IMAGE_ENCODER, STAGES, Plans, StudentManifest, graph_name
from ..folders.sizes import AnySize, Size, size_name
from ..models.control import KINDS
from ..pipelines.architectures import stages_of
from ..pipelines.loading import load_student_pipeline
from ..pipelines.lora import fused_records
from ..pipelines.skeleton import write_networks
from ..pipelines.stages import CONDITION, IMAGES, LATENTS, Stages
from .cases import Case, Sampling
from .onnx import (
    StageGraph,
    export_condition_encoder,
    export_decoder,
    export_denoiser,
    export_image_encoder,
    export_text_encoder,
)
from .options import ExportOptions
from .parity import check_tokenizers, make_cases
from .precision import find_islands, lower
from .sampler_graph import sampler_graph
from .sides import FreeSides
from .tokenizer import parity_prompts, write_tokenizers
from .weights import WeightStore

VERSIONED = ("imagine-flash", "torch", "diffusers", "transformers", "onnx", "onnxscript")
FURTHER = 2  # sizes that the gate draws beside those asked for, where there is one graph for all
Progress = Callable[[str], None]
Graphs = dict[str, StageGraph]


@dataclass(frozen=True)
class Traced:
    """What is left of the networks once they are graphs: torch's memory is free before the first graph runs."""

    stages: Graphs  # float32; by the manifest's names
    cases: list[Case]
    sampling: Sampling
    facts: dict[str, Any]  # fields of the manifest


def trace(
    folder: Path,
    target: Path,
    described: StudentManifest,
    store: WeightStore,
    options: ExportOptions,
    progress: Progress,
) -> Traced:
    """Torch's part: the networks' answers and their graphs."""
    progress("loading the student")
    pipeline = load_student_pipeline(
        folder, tiny_decoder=options.tiny_decoder, loras=options.loras, keep_half=True, variant=options.variant
    )
    stages = stages_of(pipeline)
    write_networks(target, pipeline, stages)
    del pipeline
    if stages.control is not None and options.forms == "whole-sampler":
        raise ArtifactError(
            f"a model with a {KINDS[stages.control]} has no whole-sampler graphs, since its picture is read by a stage of its own; "
            "leave out --whole-sampler"
        )
    sizes, any_size = options.sizes or (stages.default_size,), None
    if options.any_size is not None:
        any_size = stages.any_size(options.any_size)
    for size in sizes:
        stages.check_size(size)
        if any_size is not None and not any_size.holds(size):
            raise ArtifactError(f"the size {size_name(size)} is not among {any_size}; name others: --sizes")
    sampling, plans = _sampling(described, stages, options)
    prompts = list(options.prompts or parity_prompts(stages, described.known_words))
    facts = {
        "pipeline": stages.pipeline,
        "precision": options.precision,
        "prediction_type": stages.prediction_type,
        "scheduler": _plain(stages.scheduler),
        "plans": plans,
        "noise_correction": described.noise_correction,
        "sampler": described.sampler,
        "guidance": stages.guidance(described.guidance),
        "default_steps": described.default_steps if described.default_steps in plans else None,
        "sources": described.sources,
        "latent_channels": stages.latent_channels,
        "downscale": stages.downscale,
        "sizes": list(sizes),
        "any_size": any_size,
        "batch": options.batch,
        "scaling_factor": stages.decoder.scaling_factor,
        "vocabulary": described.vocabulary,
        "tokenizers": write_tokenizers(target, stages, described.known_words),
        "created_with": {package: version(package) for package in VERSIONED} | {"onnxruntime": onnxruntime.__version__},
        "loras": [record for lora in options.loras for record in fused_records(lora)],
        "control": stages.control,
        "limits": {name: value for name, value in asdict(options.limits).items() if math.isfinite(value)},
    }
    check_tokenizers(target, facts["tokenizers"], stages, prompts)
    gated = {steps: table for steps, table in sampling.tables.items() if options.gated in (None, steps)}
    further = [size for size in any_size.corners if size not in sizes][:FURTHER] if any_size else []
    drawn = (*sizes, *further)
    cases = make_cases(stages, replace(sampling, tables=gated), drawn, sorted({*options.batch}), prompts, progress)
    return Traced(_stage_graphs(stages, store, sizes, any_size, options, progress), cases, sampling, facts)


def _stage_graphs(
    stages: Stages,
    store: WeightStore,
    sizes: tuple[Size, ...],
    any_size: AnySize | None,
    options: ExportOptions,
    progress: Progress,
) -> Graphs:
    progress("writing text_encoder")
    graphs = {"text_encoder": export_text_encoder(stages, store, opset=options.opset)}
    kinds = {"denoiser": export_denoiser, "decoder": export_decoder, IMAGE_ENCODER: export_image_encoder}
    if not options.with_image_encoder:
        del kinds[IMAGE_ENCODER]
    if stages.condition_encoder is not None:
        kinds[CONDITION_ENCODER] = export_condition_encoder
    sides = FreeSides.around(sizes[0], any_size) if any_size else None
    for kind, export in kinds.items():
        for size in sizes[:1] if sides else sizes:
            name = graph_name(kind, size, sizes[0])
            progress(f"writing {name}")
            graphs[name] = export(stages, store, sides.traced if sides else size, opset=options.opset, sides=sides)
    return graphs


def samplers(stages: Graphs, traced: Traced) -> Graphs:
    """The whole-sampler graphs of every size and plan, from token ids and from embeddings; none where a conditioning picture is
    read, which is a stage's work, and none of any size."""
    graphs, sizes = {}, [] if traced.facts["control"] or traced.facts["any_size"] else traced.facts["sizes"]
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


def lowered(traced: Traced, store: WeightStore, options: ExportOptions, progress: Progress) -> Graphs:
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


def _is_of(name: str, case: Case, traced: Traced) -> bool:
    """One case per stage graph and seed: that of the smallest batch at the graph's size."""
    default, smallest = traced.facts["sizes"][0], traced.facts["batch"][0]
    at_its_size = name in {graph_name(kind, case.size, default) for kind in (*STAGES, IMAGE_ENCODER, CONDITION_ENCODER)}
    return at_its_size and len(case.prompts) == smallest


def _feed(name: str, case: Case, traced: Traced) -> dict[str, Any]:
    """What torch gave the stage in this case, as arrays by input name: of the longest plan, its noisiest step."""
    longest = max(case.walks)
    if name == "text_encoder":
        return {key: ids.numpy() for key, ids in case.tokens.items()}
    if name.startswith(CONDITION_ENCODER):
        return {CONDITION: case.condition.numpy()}
    for stage, key, given in (("decoder", LATENTS, case.latents), (IMAGE_ENCODER, IMAGES, case.images)):
        if name.startswith(stage):
            return {key: given[longest].numpy()}
    x, t, _ = case.walks[longest][0]
    values = [x, t, *case.conditions, *case.told.values()]
    names = [value.name for value in traced.stages[name].graph.input]
    return {key: value.numpy() for key, value in zip(names, values, strict=True)}


def _sampling(described: StudentManifest, stages: Stages, options: ExportOptions) -> tuple[Sampling, Plans]:
    """The plans asked for: coefficients and schedule, and the timesteps by number of steps."""
    schedule = NoiseSchedule.from_scheduler_config(stages.scheduler)
    plans = plans_by_steps(described.plans, schedule.num_train_timesteps)
    if options.steps is not None:
        plans = {steps: select(plans, steps) for steps in sorted(options.steps)}
    how: dict[str, Any] = {"noise_correction": described.noise_correction, "sampler": described.sampler}
    tables = {n: update_table(schedule, plan, stages.prediction_type, **how) for n, plan in plans.items()}
    guidance = described.guidance.default if stages.is_told_guidance else None
    return Sampling(tables, schedule, guidance), {n: list(plan) for n, plan in plans.items()}


def _plain(config: dict) -> dict:
    """The scheduler config without private keys (but for the class name), which may hold paths."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
