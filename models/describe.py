"""A model's folder, file or hub id as everything that loading and sampling it needs, and what of that was taken from where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.checked import Checked
from ..core.diffusers_samplers import plan_of, sampler_of
from ..core.errors import ArtifactError, PlanError
from ..core.plan import StepPlan, plans_by_steps
from ..core.prediction import check_prediction_type
from ..core.sampler import DETERMINISTIC, Kind, Sampler
from ..core.schedule import NoiseSchedule, is_flow
from ..folders.files import ARTIFACT_FILE, STUDENT_FILE
from ..folders.manifests import PIPELINE_FILE, Guidance, Plans, Size, StudentManifest
from ..folders.reading import read_student_manifest
from .catalogue import Entry, entry_called, find

SCHEDULER_FILE = "scheduler/scheduler_config.json"
OPTION, STUDENT, SCHEDULER = "option", STUDENT_FILE, "the scheduler's config"
Fetch = Callable[[str, str | None], Path]  # a repository's folder, or one file of it


class ModelOptions(Checked):
    """What a user says of a model that says too little, or something else, of itself. ArtifactError in one line.

    entry: a name of the catalogue that the folder is read as. steps: the numbers of steps that there shall be plans for; any_steps:
    also those that it was not trained for. timesteps: of one plan, the noisiest first. sampler: instead of the scheduler's.
    """

    refusal = ArtifactError

    entry: str | None = None
    steps: tuple[int, ...] | None = None
    any_steps: bool = False
    timesteps: tuple[int | float, ...] | None = None
    sampler: Kind | None = None
    prediction: str | None = None
    guidance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model, and how it is sampled.

    folder: of the diffusers pipeline. network: a file or folder of the denoiser's weights that take the place of the
    folder's. lora: a file or folder that is fused into them. sources: field -> where it was taken from.
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
    size: Size | None = None
    tiny_decoder: str | None = None
    known_words: list[str] = field(default_factory=list)
    vocabulary: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def schedule(self) -> NoiseSchedule:
        """Raises ScheduleError."""
        return NoiseSchedule.from_scheduler_config(self.scheduler)

    @property
    def step_plans(self) -> dict[int, StepPlan]:
        """The plans by number of steps. Raises PlanError, ScheduleError."""
        return plans_by_steps(self.plans, self.schedule.num_train_timesteps)

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
    local = Path(model).exists()
    entry = entry_called(options.entry) if options.entry else None if local else find(str(model), _one(options.steps))
    if entry is not None:
        found = _of_entry(Path(model) if local else None, entry, fetch)
    else:
        folder = fetch(str(model), None)
        is_student = (folder / STUDENT_FILE).is_file()
        found = _of_student(folder, read_student_manifest(folder), fetch) if is_student else _of_pipeline(folder)
    return _with_options(found, options, entry)


def _one(steps: tuple[int, ...] | None) -> int | None:
    return steps[0] if steps and len(steps) == 1 else None


def _of_student(folder: Path, student: StudentManifest, fetch: Fetch) -> Described:
    base, beside = folder, folder / (student.base or "")
    if student.base is not None:
        base = beside if beside.is_dir() else fetch(student.base, None)
    pipeline, scheduler = _read_pipeline(base)
    return Described(
        name=folder.resolve().name,
        folder=base,
        lora=None if student.base is None else folder,
        pipeline=pipeline,
        scheduler=scheduler,
        prediction_type=prediction_type_of(scheduler),
        plans=dict(sorted(student.plans.items(), reverse=True)),  # the first is the default: the most
        noise_correction=student.noise_correction,
        sampler=student.sampler,
        known_words=student.known_words,
        vocabulary=student.vocabulary,
        sources=dict.fromkeys(("plans", "noise_correction", "sampler"), STUDENT) | {"prediction_type": SCHEDULER},
    )


def _of_pipeline(folder: Path) -> Described:
    pipeline, scheduler = _read_pipeline(folder)
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
    """local: the folder, or the file of single weights, that is read as the entry says."""
    whole = local is not None and (local / PIPELINE_FILE).is_file()
    folder = local if local is not None and whole else fetch(entry.pipeline_id, None)
    weights = None
    if entry.weights != "pipeline" and not whole:
        weights = local or fetch(entry.hub, entry.file)
    pipeline, config = _read_pipeline(folder)
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
        size=entry.size,
        tiny_decoder=entry.tiny_decoder,
        sources=dict.fromkeys(("plans", "sampler", "guidance", "size", "tiny_decoder"), source)
        | {"prediction_type": source if "prediction_type" in entry.scheduler else SCHEDULER},
    )


def _with_options(found: Described, options: ModelOptions, entry: Entry | None) -> Described:
    """What the options change. Without plans, from the scheduler's class or evenly spaced ones where a sampler was named."""
    changed: dict[str, Any] = {}
    if options.prediction is not None:
        check_prediction_type(options.prediction)
        changed["prediction_type"] = options.prediction
    if options.guidance is not None:
        changed["guidance"] = found.guidance.model_copy(update={"default": options.guidance})
    if options.sampler is not None:
        changed["sampler"] = Sampler(kind=options.sampler)
    sources = {**found.sources, **dict.fromkeys(changed, OPTION)}
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
    described.step_plans  # noqa: B018  (raises for timesteps outside the schedule)
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
        source = f"{OPTION} steps, spaced as {found.scheduler.get('_class_name')} does"
    return plans, source


def _spaced(found: Described, steps: int, options: ModelOptions, entry: Entry | None) -> list[int | float]:
    if options.sampler is not None and entry is None and not is_flow(found.scheduler):
        return list(StepPlan.trailing(steps, int(found.scheduler.get("num_train_timesteps", 1000))))
    return list(plan_of(found.scheduler, steps, found.pipeline))


def parse_timesteps(text: str | None) -> tuple[int | float, ...] | None:
    """ "999,749.5" -> (999, 749.5). Raises ArtifactError."""
    if text is None:
        return None
    try:
        return tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError:
        raise ArtifactError(f"timesteps are numbers such as 999,749,499,249, got {text!r}") from None


def prediction_type_of(scheduler: dict[str, Any]) -> str:
    """What the network predicts, from a scheduler config."""
    return "flow" if is_flow(scheduler) else scheduler.get("prediction_type", "epsilon")


def _read_pipeline(folder: Path) -> tuple[str, dict[str, Any]]:
    """The class and the scheduler's config of a diffusers folder. Raises ArtifactError, ScheduleError."""
    if not (folder / PIPELINE_FILE).is_file():
        raise ArtifactError(_no_pipeline(folder))
    index, scheduler = read_json(folder / PIPELINE_FILE), read_json(folder / SCHEDULER_FILE)
    NoiseSchedule.from_scheduler_config(scheduler)
    return str(index.get("_class_name")), scheduler


def _no_pipeline(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist; check the path, or see the names that are known: imagine-flash models"
    if not folder.is_dir():
        return f"{folder} is a file, not a folder; for single weights add --as and a catalogue's name"
    if (folder / ARTIFACT_FILE).is_file():
        return f"{folder} is an exported artifact, not a student; give the folder that it was exported from"
    return f"{folder} is no diffusers pipeline: {PIPELINE_FILE} is missing"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ArtifactError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot read {path}: {reason}; is {path.parent} part of a diffusers pipeline?") from None
