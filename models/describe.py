"""A model's folder, file or hub id as everything that loading and sampling it needs, and what of that was taken from where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..core.diffusers_samplers import plan_of, sampler_of
from ..core.errors import ArtifactError, PlanError
from ..core.plan import StepPlan, plans_by_steps
from ..core.sampler import DETERMINISTIC, Sampler
from ..core.schedule import NoiseSchedule, is_flow, prediction_type_of
from ..folders.files import STUDENT_FILE
from ..folders.manifests import PIPELINE_FILE, Guidance, Plans, StudentManifest
from ..folders.reading import read_config, read_student_manifest
from .catalogue import Entry, entry_called, find
from .control import KINDS, check_control, check_takes_control, control_class, controlled_pipeline
from .files import NETWORKS, read_pipeline
from .options import ModelOptions

OPTION, STUDENT, SCHEDULER = "option", STUDENT_FILE, "the scheduler's config"
NONE, FULL_DECODER = "none", "the model's own"
LCM = "LatentConsistencyModelPipeline"
TOLD = {LCM: 8.5, "SanaSprintPipeline": 4.5, "FluxPipeline": 3.5}  # the scale that diffusers tells a network by default


class Fetch(Protocol):
    """The folder of a path or hub id, or one file of it. without: components whose weights are not needed; network: the
    repository is of one network alone, not of a pipeline."""

    def __call__(
        self, name: str, file: str | None = None, *, without: Sequence[str] = (), network: bool = False
    ) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model, and how it is sampled.

    folder: of the diffusers pipeline. network: a file or folder of the denoiser's weights that take the place of the
    folder's. lora: a file or folder that is fused into them. decoder: the folder of an AutoencoderTiny that takes the place
    of the folder's vae; tiny_decoder: what the catalogue names as such. control: the folder of a ControlNet or T2I-adapter.
    sources: field -> where it was taken from.
    """

    name: str
    folder: Path
    network: Path | None = None
    lora: Path | None = None
    pipeline: str
    scheduler: dict[str, Any]
    prediction_type: str
    plans: Plans
    noise_correction: bool = False
    sampler: Sampler = DETERMINISTIC
    guidance: Guidance = field(default_factory=Guidance)
    decoder: Path | None = None
    tiny_decoder: str | None = None
    control: Path | None = None
    known_words: list[str] = field(default_factory=list)
    vocabulary: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def default_steps(self) -> int:
        """The steps that a request means which says none."""
        return next(iter(self.plans))


def describe(model: str | Path, options: ModelOptions | None = None, *, fetch: Fetch) -> Described:
    """Options first, then imagine_flash.json or the catalogue, then the scheduler's own config.

    model: a student's or pipeline's folder, a hub id, or a name of the catalogue. fetch: gives the folder of a hub id, or a
    file of it. Raises ArtifactError, PlanError, ScheduleError.
    """
    options = options or ModelOptions()
    local = Path(model) if Path(model).exists() else None
    where = str(model) if local is None else str(local.resolve())
    entry = entry_called(options.entry) if options.entry else None if local else find(str(model), _one(options.steps))
    if entry is not None:
        if local is None and find(str(model)) is None:  # a hub id of one's own, read as that entry
            local = fetch(str(model), network=entry.weights == "network")
        found = _of_entry(local, entry, fetch)
    else:
        folder = fetch(str(model))
        is_student = (folder / STUDENT_FILE).is_file()
        found = _of_student(folder, read_student_manifest(folder), fetch) if is_student else _of_pipeline(folder)
    found = replace(found, sources={"weights": where} | found.sources)
    found = _with_decoder(_with_options(found, options, entry), options, fetch)
    return found if options.controlnet is None else _with_control(found, options.controlnet, fetch)


def _one(steps: tuple[int, ...] | None) -> int | None:
    return steps[0] if steps and len(steps) == 1 else None


def _of_student(folder: Path, student: StudentManifest, fetch: Fetch) -> Described:
    base, beside = folder, folder / (student.base or "")
    if student.base is not None:
        base = beside if beside.is_dir() else fetch(student.base)
    pipeline, scheduler = read_pipeline(base)
    return Described(
        name=folder.resolve().name,
        folder=base,
        lora=None if student.base is None else folder,
        pipeline=pipeline,
        scheduler=scheduler,
        prediction_type=prediction_type_of(scheduler),
        plans=dict(sorted(student.plans.items(), key=lambda plan: (plan[0] != student.default_steps, -plan[0]))),
        noise_correction=student.noise_correction,
        sampler=student.sampler,
        guidance=student.guidance,
        known_words=student.known_words,
        vocabulary=student.vocabulary,
        sources=dict.fromkeys(("plans", "noise_correction", "sampler"), STUDENT)
        | ({"guidance": STUDENT} if "guidance" in student.model_fields_set else {})
        | {"prediction_type": SCHEDULER},
    )


def _of_pipeline(folder: Path) -> Described:
    pipeline, scheduler = read_pipeline(folder)
    return Described(
        name=folder.resolve().name,
        folder=folder,
        pipeline=pipeline,
        scheduler=scheduler,
        prediction_type=prediction_type_of(scheduler),
        plans={},
        sources={"prediction_type": SCHEDULER},
    )


def _of_entry(local: Path | None, entry: Entry, fetch: Fetch) -> Described:
    """local: the folder, or the file of single weights, that is read as the entry says. A LoRA goes into a whole folder; a network
    is taken to be there already."""
    whole = local is not None and (entry.weights == "pipeline" or (local / PIPELINE_FILE).is_file())
    without = NETWORKS if entry.weights == "network" and not whole else ()
    folder = local if local is not None and whole else fetch(entry.pipeline_id, without=without)
    weights, said = None if whole else local, {}
    if weights is not None and entry.file and (weights / entry.file).is_file():  # a copy of the entry's own repository
        weights /= entry.file
    if entry.weights == "lora" and whole:
        said["lora"] = f"{entry.where}, which is fused into the network"
    elif entry.weights == "network" and whole:
        said["network"] = "the weights' own folder, in place of the catalogue's"
    if weights is None and (entry.weights == "lora" or without):
        weights = fetch(entry.hub, entry.file, network=entry.weights == "network")
    pipeline, config = read_pipeline(folder, without)
    source = f"the catalogue's {entry.name} ({entry.sources[0]})"
    scheduler = entry.scheduler_of(config)
    return Described(
        name=entry.name,
        folder=folder,
        network=weights if entry.weights == "network" else None,
        lora=weights if entry.weights == "lora" else None,
        pipeline=pipeline,
        scheduler=scheduler,
        prediction_type=prediction_type_of(scheduler),
        plans={steps: entry.plans(config)[steps] for steps in entry.steps},
        sampler=entry.sampler_of(config),
        guidance=entry.guidance,
        tiny_decoder=entry.tiny_decoder,
        sources=said
        | dict.fromkeys(("plans", "sampler", "guidance"), source)
        | {"prediction_type": source if "prediction_type" in entry.scheduler else SCHEDULER},
    )


def _with_options(found: Described, options: ModelOptions, entry: Entry | None) -> Described:
    """What the options change. Without plans, from the scheduler's class or evenly spaced ones where a sampler was named."""
    changed: dict[str, Any] = {}
    if options.prediction is not None:
        changed["prediction_type"] = options.prediction
    if options.sampler is not None:
        changed["sampler"] = Sampler(kind=options.sampler)
    sources = {**found.sources, **dict.fromkeys(changed, OPTION)}
    scale, told = {}, _is_told_guidance(found)
    if options.guidance is not None:
        scale, sources["guidance"] = {"default": options.guidance}, OPTION
    elif told and "guidance" not in sources:
        pipeline = found.pipeline if found.pipeline in TOLD else LCM
        scale, sources["guidance"] = {"default": TOLD[pipeline]}, f"diffusers' pipeline {pipeline}, by default"
    zero = found.guidance.empty_is_zero or _zeros_for_no_prompt(found)
    changed["guidance"] = found.guidance.model_copy(update={**scale, "embedded": told, "empty_is_zero": zero})
    if options.timesteps is not None:
        changed["plans"] = {len(options.timesteps): list(StepPlan(options.timesteps))}
        sources["plans"] = f"{OPTION} timesteps"
    elif options.steps is not None or not found.plans:
        changed["plans"], sources["plans"] = _plans_for(found, options, entry)
    if "sampler" not in changed and "sampler" not in sources:
        own = sampler_of(found.scheduler)
        if own.kind == "strategic":  # TCD's gamma is the pipelines' argument eta, 0 unless somebody says otherwise
            own = own.model_copy(update={"gamma": 0.0})
        changed["sampler"], sources["sampler"] = own, SCHEDULER
    described = replace(found, **changed, sources=sources)
    if is_flow(described.scheduler) and described.prediction_type != "flow":
        raise ArtifactError(f"a flow's network predicts 'flow', got {described.prediction_type!r}")
    plans_by_steps(described.plans, NoiseSchedule.from_scheduler_config(described.scheduler).num_train_timesteps)
    return described


def _plans_for(found: Described, options: ModelOptions, entry: Entry | None) -> tuple[Plans, str]:
    if options.steps is None:
        raise PlanError(
            f"{found.folder} does not say for how many steps it was trained: add --steps 4 or --timesteps 999,749,499,249, and "
            "before serve: imagine-flash export FOLDER OUT --steps 4",
            param="steps",
        )
    plans, source = {}, found.sources.get("plans", SCHEDULER)
    for steps in options.steps:
        if steps in found.plans:
            plans[steps] = found.plans[steps]
            continue
        if found.plans and not options.any_steps:
            known = ", ".join(map(str, sorted(found.plans)))
            raise PlanError(
                f"steps must be {known} for {found.name}, got {steps}; it was trained for no other; --any-steps draws anyway",
                param="steps",
            )
        plans[steps] = _spaced(found, steps, options, entry)
        untrained = ", which it was not trained for" if found.plans else ""
        source = f"{OPTION} steps{untrained}, spaced as {found.scheduler.get('_class_name')} does"
    return plans, source


def _spaced(found: Described, steps: int, options: ModelOptions, entry: Entry | None) -> list[int | float]:
    if options.sampler is not None and entry is None and not is_flow(found.scheduler):
        return list(StepPlan.trailing(steps, int(found.scheduler.get("num_train_timesteps", 1000))))
    return list(plan_of(found.scheduler, steps, found.pipeline))


def _with_decoder(found: Described, options: ModelOptions, fetch: Fetch) -> Described:
    """The decoder asked for. Of one that is only preferred, and that is not here, the model's own takes the place."""
    wanted = options.tiny_decoder or (found.tiny_decoder if options.prefer_tiny else None)
    if wanted in (None, NONE):
        return replace(found, sources=found.sources | {"decoder": FULL_DECODER})
    try:
        folder = fetch(wanted, network=True)
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ArtifactError(f"{folder} is no AutoencoderTiny: it needs config.json and a .safetensors file")
    except ArtifactError as error:
        if options.tiny_decoder is not None:
            raise
        return replace(found, sources=found.sources | {"decoder": f"{FULL_DECODER}; the tiny one is not here: {error}"})
    return replace(found, decoder=folder, sources=found.sources | {"decoder": f"{wanted}, a tiny one"})


def _with_control(found: Described, wanted: str, fetch: Fetch) -> Described:
    """With a ControlNet or T2I-adapter that fits its network. Raises ArtifactError."""
    check_takes_control(found.pipeline)
    folder = fetch(wanted, network=True)
    kind = control_class(folder)
    check_control(kind, read_config(folder / "config.json"), _network_config(found))
    pipeline = controlled_pipeline(found.pipeline, kind)
    return replace(
        found, control=folder, pipeline=pipeline, sources=found.sources | {"control": f"{wanted}, a {KINDS[kind]}"}
    )


def _zeros_for_no_prompt(found: Described) -> bool:
    """Whether an empty negative prompt is zeros: XL's pipelines say so in their index, and do so where it does not."""
    is_xl = found.pipeline.startswith("StableDiffusionXL")
    return is_xl and bool(read_config(found.folder / PIPELINE_FILE).get("force_zeros_for_empty_prompt", True))


def _is_told_guidance(found: Described) -> bool:
    """Whether the denoiser takes a guidance scale: by its own config."""
    config = _network_config(found)
    return bool(config.get("time_cond_proj_dim") or config.get("guidance_embeds"))


def _network_config(found: Described) -> dict[str, Any]:
    """The denoiser's own config, which may come with its weights; empty where there is none."""
    places = [found.network, *(found.folder / name for name in NETWORKS)]
    configs = [place / "config.json" for place in places if place is not None]
    own = next((config for config in configs if config.is_file()), None)
    return {} if own is None else read_config(own)
