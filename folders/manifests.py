"""What the two folders of this project say of themselves, as validated models.

A student folder is a diffusers pipeline (or a LoRA) plus `imagine_flash.json`; an artifact folder is `manifest.json` plus
graphs, weights, tokenizers and reference pictures.
"""

import re
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..core.errors import nearest
from ..core.plan import StepPlan, plans_by_steps
from ..core.sampler import DETERMINISTIC, Sampler
from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable, update_table
from .sizes import AnySize, Size, size_name

STAGES = ("text_encoder", "denoiser", "decoder")
IMAGE_ENCODER = "image_encoder"  # a stage that only drawing from a picture needs
CONDITION_ENCODER = "condition_encoder"  # a stage of models with a ControlNet or T2I-adapter
SAMPLERS = ("sampler_{}", "sampler_{}_from_embeddings")  # by number of steps
WHOLE_SAMPLER = "sampler_"  # how their names begin, and no stage's
PIPELINE_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
STUDENT_BATCHES = (1, 63)  # the smallest and the largest of a student that runs in torch
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_CONFIG = "adapter_config.json"  # peft's name, beside the weights

Plans = dict[int, list[int | float]]  # the timesteps of each number of steps, the noisiest first


def graph_name(kind: str, size: Size | None, default: Size) -> str:
    """What a stage or sampler is called in `graphs`: its plain name at the default size, else with the size."""
    if kind == "text_encoder" or size is None or tuple(size) == default:
        return kind
    return f"{kind}_{size_name(size)}"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(_Frozen):
    """One input or output of a graph; shape holds numbers, or the names of what is free at run time: "batch" and, of a model of
    any size, "height" and "width" of the picture or parts of them, such as "height/8"."""

    name: str
    dtype: str
    shape: list[int | str]

    def at(self, batch: int, size: Size) -> tuple[int, ...]:
        """The shape for so many pictures of that size."""
        free = {"batch": batch, "height": size[0], "width": size[1]}

        def number(name: str) -> int:
            side, _, part = name.partition("/")
            return free[side] // int(part or 1)

        return tuple(number(each) if isinstance(each, str) else each for each in self.shape)


class GraphSpec(_Frozen):
    """One ONNX file, relative to the artifact folder.

    nodes: how many attention and normalisation operators it has, by name; none where they were decomposed. islands: the
    modules that stay in float32 in a graph of lower precision.
    """

    file: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    opset: int = Field(ge=1)
    nodes: dict[str, int] = {}
    islands: list[str] = []


class TokenizerSpec(_Frozen):
    """A tokenizer file, the length prompts are padded to, the inputs of the text encoder that it feeds, known words.

    input: takes the token ids. mask: takes the attention mask (1 for tokens, 0 for padding), where the model reads one.
    lowercase: the pipeline lowers and strips the prompt first; prefix: and writes this before it.
    """

    file: str
    context_length: int = Field(ge=1)
    input: str = "input_ids"
    mask: str | None = None
    known_words: list[str] = []
    lowercase: bool = False
    prefix: str = ""

    def text(self, prompt: str) -> str:
        """What is tokenized of a prompt. Not a normalizer in the file: it would touch each piece between added tokens, such as
        the line breaks of Gemma's."""
        return self.prefix + (prompt.lower().strip() if self.lowercase else prompt)


class ReferencePicture(_Frozen):
    """A picture that torch drew at export, lossless, so that any machine can compare what it draws itself. condition: the file
    of the conditioning picture, where there was one."""

    file: str
    prompt: str
    seed: int = Field(ge=0)
    steps: int = Field(ge=1)
    size: Size
    condition: str | None = None


class Guidance(_Frozen):
    """How strongly a prompt pulls: diffusers' guidance_scale, 1 is none.

    default: of a request that says nothing. range: what the model was made for, as far as its card says; others are drawn
    with a note. embedded: the network is told the scale; else the prompt's prediction is weighed against that of the
    negative prompt, in two rows a picture. empty_is_zero: an empty negative prompt is no text but embeddings of zeros.
    """

    default: float = Field(default=1.0, ge=0)
    range: tuple[float, float] | None = None
    embedded: bool = False
    empty_is_zero: bool = False


class FusedLora(_Frozen):
    """A LoRA that was added to the student's weights at export. sha256: of its tensors' file."""

    name: str
    weight: float
    sha256: str


class _Sampled(_Frozen):
    """How a model is sampled, and what it can draw."""

    format: str
    format_version: Literal[1] = 1
    plans: Plans
    noise_correction: bool
    sampler: Sampler = DETERMINISTIC
    guidance: Guidance = Guidance()
    default_steps: int | None = None  # of a request that says nothing; None: the most
    sources: dict[str, str] = {}  # what was taken from where, of a model that somebody else trained
    vocabulary: dict[
        str, list[str]
    ] = {}  # in groups of words for a person to choose from; empty where it knows them all


class StudentManifest(_Sampled):
    """`imagine_flash.json`: what diffusers' own files do not say about a student."""

    format: Literal["imagine-flash-student"] = "imagine-flash-student"
    recipe: dict[str, Any]
    teacher_sha256: str
    base: str | None = None  # of a LoRA student: the pipeline (folder or hub id) that its weights are fused into
    known_words: list[str] = []  # of the prompts it was distilled with; empty where they are too many to tell
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    @field_validator("plans")
    @classmethod
    def _plans_are_valid(cls, plans: Plans) -> Plans:
        plans_by_steps(plans, int(max((t for steps in plans.values() for t in steps), default=0)) + 2)
        return plans

    @property
    def step_plans(self) -> dict[int, StepPlan]:
        """The plans by number of steps."""
        return {n: StepPlan(tuple(steps)) for n, steps in sorted(self.plans.items())}


class ModelDescription(_Sampled):
    """What the runtime knows of any model that it draws with, be it an artifact or a student that runs in torch.

    It is refused unless every plan can be sampled.
    """

    format: Literal["imagine-flash-artifact", "imagine-flash-student"]
    name: str
    created_with: dict[str, str]
    pipeline: str = "StableDiffusionPipeline"  # diffusers' class
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"]
    scheduler: dict[str, Any]
    latent_channels: int = Field(ge=1)
    downscale: int = Field(ge=1)  # pixels of an image's side per latent
    sizes: list[Size] = Field(min_length=1)  # of the images, each with graphs of its own; the first is the default
    any_size: AnySize | None = None  # where one set of graphs draws these, `sizes` among them
    batch: tuple[int, int]  # the smallest and the largest that may be asked for; of an artifact, that was checked
    scaling_factor: float = Field(gt=0)
    control: str | None = None  # diffusers' class of the network that reads a conditioning picture
    tokenizers: list[TokenizerSpec] = Field(min_length=1)

    @field_validator("sizes")
    @classmethod
    def _sizes_are_positive(cls, sizes: list[Size]) -> list[Size]:
        if min(min(size) for size in sizes) < 1:
            raise ValueError(f"sizes must be >= 1, got {sizes}")
        return sizes

    @field_validator("batch")
    @classmethod
    def _batch_is_a_range(cls, batch: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= batch[0] <= batch[1]:
            raise ValueError(f"the batch must run from 1 or more upwards, got {batch[0]}-{batch[1]}")
        return batch

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        self.update_tables()
        if self.default_steps is not None and self.default_steps not in self.plans:
            raise ValueError(f"default_steps {self.default_steps} have no plan; there are {sorted(self.plans)}")
        for size in self.sizes:
            if size[0] % self.downscale or size[1] % self.downscale:
                raise ValueError(f"the size {size_name(size)} is no multiple of downscale {self.downscale}")
            if self.any_size is not None and not self.any_size.holds(size):
                raise ValueError(f"the size {size_name(size)} is not among {self.any_size}")
        return self

    @property
    def graph_names(self) -> Collection[str]:
        """The stages and samplers there are: of a student, every stage at every size."""
        stages = (*self.stages, IMAGE_ENCODER)
        return dict.fromkeys(self.graph_name(stage, size) for size in self.sizes for stage in stages)

    @property
    def stages(self) -> tuple[str, ...]:
        """The kinds of stages that it draws with."""
        return (*STAGES, *([CONDITION_ENCODER] if self.control else []))

    def graph_name(self, kind: str, size: Size | None = None) -> str:
        """What a stage or sampler is called at a size: a key in an artifact's `graphs`."""
        return graph_name(kind, None if self.any_size else size, self.sizes[0])

    def draws(self, size: Size) -> bool:
        """Whether there are graphs for that size."""
        return size in self.sizes or (self.any_size is not None and self.any_size.holds(size))

    @property
    def image_size(self) -> Size:
        """Height and width of an image of the default size."""
        return self.sizes[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of the default size."""
        return self.latent_shape_of(self.sizes[0])

    def latent_shape_of(self, size: Size) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image of `size`."""
        return self.latent_channels, size[0] // self.downscale, size[1] // self.downscale

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the stored scheduler config."""
        return NoiseSchedule.from_scheduler_config(self.scheduler)

    @property
    def step_plans(self) -> dict[int, StepPlan]:
        """The plans by number of steps."""
        return plans_by_steps(self.plans, self.schedule.num_train_timesteps)

    @property
    def default_plan(self) -> int:
        """The steps of a request that says nothing."""
        return self.default_steps or max(self.plans)

    def update_tables(self) -> dict[int, UpdateTable]:
        """The update's coefficients by number of steps."""
        schedule = self.schedule
        plans = plans_by_steps(self.plans, schedule.num_train_timesteps)
        how: dict[str, Any] = {"noise_correction": self.noise_correction, "sampler": self.sampler}
        return {n: update_table(schedule, plan, self.prediction_type, **how) for n, plan in plans.items()}


class ArtifactManifest(ModelDescription):
    """`manifest.json`: all that the runtime needs beside the graphs."""

    format: Literal["imagine-flash-artifact"] = "imagine-flash-artifact"
    graphs: dict[str, GraphSpec]
    files: dict[str, str]
    parity: dict[str, dict[str, float]]
    limits: dict[str, float] = {}  # what the gate allowed: Limits of export.parity
    references: list[ReferencePicture] = []
    formats: dict[str, dict[str, Any]] = {}  # what lies beside the ONNX graphs, by format
    student_sha256: str
    loras: list[FusedLora] = []
    sha256: str = ""  # of all other fields; `write_manifest` sets it

    @field_validator("files")
    @classmethod
    def _files_stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name, digest in files.items():
            if not _is_inside(name):
                raise ValueError(f"{name!r} leaves the folder; only plain relative paths are read")
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"the sha256 of {name!r} must be 64 hex digits, got {digest!r}")
        return files

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        stages = {self.graph_name(stage, size) for stage in self.stages for size in self.sizes}
        kinds = [kind.format(n) for kind in SAMPLERS for n in self.plans]
        samplers = {self.graph_name(kind, size) for kind in kinds for size in self.sizes}
        missing = sorted(stages - self.graphs.keys())
        whole = all(any(self.graph_name(kind, size) in self.graphs for kind in kinds) for size in self.sizes)
        if missing and not (whole and not stages & self.graphs.keys()):
            raise ValueError(f"the graph {missing[0]!r} is missing")
        known = stages | samplers | {self.graph_name(IMAGE_ENCODER, size) for size in self.sizes}
        for name in self.graphs:
            if name not in known:
                raise ValueError(f"unknown graph {name!r}{nearest(name, known)}")
        used = [part.file for part in (*self.tokenizers, *self.graphs.values(), *self.references)]
        for name in used + [part.condition for part in self.references if part.condition]:
            if name not in self.files:
                raise ValueError(f"{name!r} is used but has no sha256 in 'files'")
        return self

    @property
    def graph_names(self) -> Collection[str]:
        """The stages and samplers there are."""
        return self.graphs.keys()

    @property
    def holds_int8(self) -> bool:
        """Whether its OpenVINO files are in 8 bits."""
        return str(self.formats.get("openvino", {}).get("weights", "")).startswith("int8")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name and "\\" not in name and ":" not in name and "\0" not in name
    return bool(plain) and not path.is_absolute() and ".." not in path.parts and name == path.as_posix() and name != "."
