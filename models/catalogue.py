"""The catalogue of few-step models, shipped as data: catalogue.yaml says what its fields mean."""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..core.diffusers_samplers import plan_of, sampler_of
from ..core.errors import ArtifactError, nearest
from ..core.plan import StepPlan
from ..core.sampler import Sampler
from ..folders.manifests import Guidance, Plans, Size

Weights = Literal["pipeline", "network", "lora"]


class Entry(BaseModel):
    """One model of the catalogue; the fields are explained in catalogue.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    hub: str
    file: str | None = None
    weights: Weights = "pipeline"
    base: str | None = None
    pipeline: str
    scheduler: dict[str, Any]
    sampler: dict[str, Any] = {}
    steps: tuple[int, ...] = Field(min_length=1)
    timesteps: dict[int, list[int | float]] = {}
    guidance: Guidance
    size: Size
    parameters: float | None = Field(default=None, gt=0)
    tiny_decoder: str | None = None
    licence: str
    sources: tuple[str, ...] = Field(min_length=1)
    verified: bool = False

    @field_validator("size", mode="before")
    @classmethod
    def _size_as_people_write_it(cls, size: Any) -> Any:
        found = re.fullmatch(r"(\d+)x(\d+)", size) if isinstance(size, str) else None
        return size if found is None else (int(found[2]), int(found[1]))

    @model_validator(mode="after")
    def _weights_have_a_base(self) -> Entry:
        if (self.weights == "pipeline") != (self.base is None):
            raise ValueError(f"weights of a {self.weights} and base {self.base!r} do not go together")
        if wrong := set(self.timesteps) - set(self.steps):
            raise ValueError(f"timesteps of {sorted(wrong)} steps, which it was not trained for")
        return self

    @property
    def pipeline_id(self) -> str:
        """Where the pipeline's folder is."""
        return self.base or self.hub

    @property
    def where(self) -> str:
        """The repository, and the file in it."""
        return f"{self.hub}/{self.file}" if self.file else self.hub

    def scheduler_of(self, config: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's own scheduler config with what the card changes, as diffusers' from_config does it."""
        return {**config, **self.scheduler}

    def sampler_of(self, config: dict[str, Any]) -> Sampler:
        """The sampler of the pipeline's own scheduler config. Raises ScheduleError."""
        return Sampler(**{**sampler_of(self.scheduler_of(config)).model_dump(), **self.sampler})

    def plan(self, config: dict[str, Any], steps: int) -> StepPlan:
        """The timesteps of so many steps, trained for or not. Raises PlanError, ScheduleError."""
        known = self.timesteps.get(steps)
        return plan_of(self.scheduler_of(config), steps, self.pipeline) if known is None else StepPlan(tuple(known))

    def plans(self, config: dict[str, Any]) -> Plans:
        """The timesteps of every number of steps that it was trained for."""
        return {steps: list(self.plan(config, steps)) for steps in sorted(self.steps)}


@functools.cache
def catalogue() -> dict[str, Entry]:
    """The entries by name, in the file's order. Raises ArtifactError for a file that is none."""
    import yaml

    file = files("imagine_flash.models").joinpath("catalogue.yaml")
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        return {name: Entry(name=name, **fields) for name, fields in values.items()}
    except (ValidationError, TypeError) as error:
        raise ArtifactError(f"the catalogue is damaged ({' '.join(str(error).split())[:300]}); reinstall") from None


def find(model: str, steps: int | None = None) -> Entry | None:
    """The entry of that name, or of that hub id: of several the one for so many steps, else the first. None: not known.

    model: "sdxl-lightning-4step", "ByteDance/SDXL-Lightning", or that with the file after a further slash.
    """
    entries = catalogue()
    if model in entries:
        return entries[model]
    same = [entry for entry in entries.values() if model in (entry.hub, entry.where)]
    fitting = [entry for entry in same if steps in entry.steps]
    return next(iter(fitting or same), None)


def entry_called(name: str) -> Entry:
    """The entry of that name or hub id. Raises ArtifactError that names the nearest one."""
    entry = find(name)
    if entry is None:
        known = [*catalogue(), *(entry.hub for entry in catalogue().values())]
        raise ArtifactError(f"the catalogue has no {name!r}{nearest(name, known)}; see: imagine-flash models")
    return entry


def as_markdown() -> str:
    """The catalogue as the table of docs/models.md."""
    lines = ["| name | weights | steps | size | parameters | guidance | licence |", "|---|---|---|---|---|---|---|"]
    for entry in catalogue().values():
        steps, size = ", ".join(map(str, sorted(entry.steps))), f"{entry.size[1]}x{entry.size[0]}"
        parameters = f"{entry.parameters:g} G" if entry.parameters else ""
        cells = (f"`{entry.name}`", f"[{entry.where}]({entry.sources[0]})", steps, size, parameters)
        lines.append(f"| {' | '.join(cells)} | {entry.guidance.default:g} | {entry.licence} |")
    return "\n".join(lines)
