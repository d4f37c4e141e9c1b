"""Recipes: every choice of a training in one validated, frozen YAML file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..core.errors import RecipeError, nearest
from ..core.plan import StepPlan

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]  # as AdamW takes it


class Frozen(BaseModel):
    """Keyword-only, immutable, and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Fit(Frozen):
    """How one network is fitted: updates, batch, optimiser, EMA, intervals."""

    steps: Positive
    batch: Positive = 64  # of one update, over all processes
    accumulate: Positive = 1  # parts of each process's share that are computed one after another
    # muon: for the matrices inside the network, AdamW for the rest; adamw8bit: AdamW with moments in 8 bits
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    muon_rate: Annotated[float, Field(gt=0)] = 5e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 200
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Share = 0.999
    mixed_precision: Literal["no", "bf16"] = "no"  # weights stay float32; fp16 overflows at high noise
    captured: bool = (
        False  # on a GPU as CUDA graphs (on a CPU it changes nothing): small networks then train several times as fast
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 2.0
    preview_every: Annotated[int, Field(ge=0)] = 500
    validate_every: Annotated[int, Field(ge=0)] = 0  # updates between two validations; 0: none
    keep_best: bool = False  # the weights of the best validation are the result, not the last ones
    patience: Annotated[int, Field(ge=0)] = 0  # updates without a better validation that end the training; 0: none do

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """YAML reads a bare no as false."""
        return "no" if value is False else value

    @model_validator(mode="after")
    def _validates(self) -> Self:
        if (self.keep_best or self.patience) and not self.validate_every:
            raise ValueError("keep_best and patience need validate_every, the updates between two validations")
        return self


class Autoencoder(Frozen):
    """An AutoencoderTiny that maps a picture to latents of an eighth of its side: linear encoder, deep decoder."""

    width: Positive = 48
    decoder_blocks: tuple[int, int, int, int] = (4, 3, 1, 0)  # residual blocks per resolution, smallest first
    latent_channels: Positive = 24
    whitening: Share = 0.3  # 1: every latent of the same variance; 0: as much as it has in the pictures
    deviation: Annotated[float, Field(gt=0)] = 0.7  # of all latents together
    encoder_scenes: Annotated[int, Field(ge=64)] = 2000  # whose principal components are the encoder
    latent_noise: Annotated[float, Field(ge=0)] = (
        0.03  # added before decoding, so that the decoder forgives the student
    )
    fit: Fit


class Network(Frozen):
    """Sizes of the text encoder and the UNet."""

    context: Annotated[int, Field(ge=8, le=77)] = 32
    text_width: Positive = 128
    text_layers: Positive = 2
    text_heads: Positive = 4
    channels: tuple[int, ...] = (96, 160)
    attention: tuple[bool, ...] = (False, True)  # per level, largest first; the middle always has it
    layers_per_block: Positive = 1
    heads: Positive = 4
    norm_groups: Positive = 16

    @model_validator(mode="after")
    def _one_choice_a_level(self) -> Self:
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention must have one value per level of channels, {len(self.channels)}")
        return self


class TeacherRecipe(Frozen):
    """`train-teacher`: a latent text-to-image model on emoji scenes."""

    seed: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(ge=32, multiple_of=16)] = 64
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = False
    # start: what the teacher of --start predicts at the same x_t; without the noise of data it takes far fewer updates
    targets: Literal["data", "start"] = "data"
    caption_dropout: Share = 0.1
    stated_patterns: Share = 0.0  # of the captions that say the background's pattern; some others do too
    scenes: Positive = 80_000  # rendered and encoded once, then drawn from at random
    autoencoder: Autoencoder
    network: Network = Network()
    fit: Fit

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.fit.mixed_precision != self.autoencoder.fit.mixed_precision:
            raise ValueError("fit and autoencoder.fit must have the same mixed_precision")
        return self


class LoraSettings(Frozen):
    """Low-rank adapters instead of the whole network."""

    rank: Positive = 64
    alpha: Annotated[float, Field(gt=0)] | None = None  # None: the rank, so that the scale is 1
    targets: Literal["all", "attention"] | tuple[str, ...] = "all"  # layers, or the ends of their names


class DistillRecipe(Frozen):
    """`distill`: what every method has; its own fields stand in its file in `methods/`."""

    draws_by_length: ClassVar[bool] = (
        False  # whether what an update draws depends on `fit.steps`: it has phases or rounds
    )
    draws_plans: ClassVar[bool] = True  # whether an update is of one plan, drawn by `plan_weights`
    method: str
    seed: Annotated[int, Field(ge=0)] = 0
    plans: Annotated[dict[int, tuple[int, ...]], Field(min_length=1)] = {1: (999,), 2: (999, 499), 3: (999, 666, 333)}
    plan_weights: dict[int, Annotated[float, Field(ge=0)]] = {}  # how often each plan is drawn; none: all alike
    guidance: tuple[float, float] = (2.0, 2.0)  # drawn uniformly; in the teacher's target only
    negative_prompt: str = ""  # what the guidance leads away from
    noise_correction: bool = False  # at inference: the true noise at t = T
    prompts: Positive = 60_000  # scenes or pictures at most; of --prompts FILE every line is used
    stated_patterns: Share = (
        0.0  # of the captions of emoji scenes that say the background's pattern; some others do too
    )
    lora: LoraSettings | None = None  # None: the whole network trains
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of all that does not train
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass
    cache_text: bool = False  # embeddings of all prompts once, on disk; the text encoders then leave the device
    fit: Fit

    @model_validator(mode="after")
    def _plans_are_plans(self) -> Self:
        for steps, timesteps in self.plans.items():
            if steps != len(timesteps):
                raise ValueError(f"plans: {steps} steps must have {steps} timesteps, got {list(timesteps)}")
            StepPlan(timesteps)
        if not self.draws_plans and len(set(self.plan_weights.values())) > 1:
            raise ValueError(f"plan_weights: {self.method} draws times of its own and no plans; leave it out")
        if not self.plan_weights:
            object.__setattr__(self, "plan_weights", dict.fromkeys(self.plans, 1.0))
        if set(self.plan_weights) != set(self.plans):
            raise ValueError(f"plan_weights must name the same steps as plans: {sorted(self.plans)}")
        if sum(self.plan_weights.values()) <= 0:
            raise ValueError("plan_weights must not all be 0")
        if (self.teacher_dtype, self.fit.mixed_precision) == ("float16", "bf16"):
            raise ValueError("teacher_dtype float16 cannot compute under mixed_precision bf16; write bfloat16")
        if self.lora is not None and self.teacher_dtype == "float16":
            raise ValueError(
                "teacher_dtype float16 rounds most of a LoRA's gradients to 0 on their way through the network; write bfloat16, "
                "or float32 where the GPU has none"
            )
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance must be [low, high], got {list(self.guidance)}")
        return self


R = TypeVar("R", bound=Frozen)


def built_in_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that the package ships."""
    folder = Path(str(files("imagine_flash.distill").joinpath("recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, kind: type[R]) -> R:
    """A built-in recipe by name or any YAML file by path; what names a `base` need only hold what differs. RecipeError names
    the key and the nearest known one."""
    values, path = read_with_base(name_or_path)
    return parse_recipe(values, kind, path)


def read_recipe(name_or_path: str | Path) -> tuple[dict[str, Any], Path]:
    """Keys and values of a recipe as they stand in its file, and the file. RecipeError where there is none."""
    import yaml

    known = built_in_recipes()
    path = known.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        similar = nearest(str(name_or_path), list(known))
        raise RecipeError(
            f"no recipe {str(name_or_path)!r}{similar}; built in: {', '.join(known)}; or give a YAML file"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values, path


def read_with_base(name_or_path: str | Path, *above: Path) -> tuple[dict[str, Any], Path]:
    """The same, merged into the recipe that its key `base` names, built in or a path, and that one into its own. RecipeError."""
    values, path = read_recipe(name_or_path)
    if path in above:
        raise RecipeError(f"{path} is its own base, by way of {', '.join(map(str, above))}")
    if (base := values.pop("base", None)) is None:
        return values, path
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base = {base!r}: must be the name or path of a recipe")
    return merged(read_with_base(base, *above, path)[0], values), path


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; mappings of the fit are merged key by key, everything else is replaced."""
    result = {**base, **changes}
    if isinstance(base.get("fit"), dict) and isinstance(changes.get("fit"), dict):
        result["fit"] = {**base["fit"], **changes["fit"]}
    return result


def parse_recipe(values: dict[str, Any], kind: type[R], source: str | Path) -> R:
    """The validated recipe; RecipeError begins with `source`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_first_problem(error, kind)}") from None


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    problem = min(
        error.errors(), key=lambda e: e["type"] != "extra_forbidden"
    )  # a misspelt key before the key it misses
    where = ".".join(map(str, problem["loc"])) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}{nearest(str(problem['loc'][-1]), _keys_at(kind, problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where} = {problem['input']!r}: {message}" if where != "recipe" else message


def _keys_at(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    for name in place:
        inner = kind.model_fields[str(name)].annotation if str(name) in kind.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)
