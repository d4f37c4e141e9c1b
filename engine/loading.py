"""From a folder or a hub id to what an engine is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..core.checked import Checked
from ..core.errors import ArtifactError, RequestError, nearest
from ..folders.hub import HUB_ID, hub_file, local_folder
from ..folders.loras import check_name
from ..folders.manifests import STUDENT_BATCHES, ModelDescription
from ..folders.reading import read_artifact_manifest
from ..folders.sizes import Size, size_name, sizes_text
from .backends.base import TUNED_BACKENDS, Backend, BackendOptions, check_device
from .backends.choosing import check_backend, choose, installed, load_backend, runs_student
from .precision import bf16_is_accurate
from .prompt_cache import DEFAULT_BYTES
from .tokenizer import PromptTokenizer

Route = Literal["stages", "sampler"]
ROUTES = ("stages", "sampler")
EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "emoji" / "artifact"
MAX_WAITING = 1024  # pictures
STUDENT_BATCH = 4  # pictures of one network call, where a student runs in torch and nothing else is said


class ExecutionOptions(Checked):
    """What draws and with what, the same in Python and in a server's settings.

    backend, device, precision: "auto" takes what is fastest of what is installed and present; `Engine.describe` says what
    that was. max_batch: pictures of one network call; None takes the most that the artifact was checked with, of a student 4.
    threads: of the processor, for one network call; None takes all that this process may use. long_prompts: "cut" at the
    context, with a note; or "joined", in chunks of 75 tokens, where CLIP reads them and torch runs the student eagerly.
    autotune: torch-compile and torch-graph try kernels out when they load a network; torch-compile keeps what it found, which
    takes minutes for each batch size the first time.
    """

    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    max_batch: int | None = None
    threads: int | None = Field(default=None, ge=1)
    long_prompts: Literal["cut", "joined"] = "cut"
    autotune: bool = False

    @model_validator(mode="after")
    def _can_be_tuned(self) -> Self:
        if self.autotune and self.backend not in TUNED_BACKENDS:
            known = " or ".join(TUNED_BACKENDS)
            raise ValueError(f"autotune: goes with the backend {known}, got the backend {self.backend}")
        return self


class LoadOptions(ExecutionOptions):
    """How a model is loaded. Keyword-only, frozen; RequestError in one line for what cannot be.

    Those of ExecutionOptions, and route: "stages" runs text encoder, denoiser and decoder one after another, "sampler" the whole
    sampler as one graph; an artifact that holds the graphs of one alone takes that one. sizes: of the artifact's, (height,
    width), those that will be asked for, and no others are drawn; None takes all, of a student the networks' own. max_waiting:
    pictures that may wait before requests are refused. prompt_cache_bytes: room for embeddings of the prompts seen last; 0
    encodes every time. loras: those that requests may ask for by name (GenerateRequest.lora): files, folders or hub ids in the
    formats of diffusers, peft and kohya. revision: of a hub id, a branch, tag or commit; None is main.
    """

    model_config = ConfigDict(strict=True)

    route: str = "stages"
    sizes: Sequence[Size] | None = None
    max_waiting: int = Field(default=MAX_WAITING, ge=1)
    prompt_cache_bytes: int = Field(default=DEFAULT_BYTES, ge=0)
    revision: str | None = None
    loras: Mapping[str, str | Path] = Field(default_factory=dict)

    @field_validator("loras")
    @classmethod
    def _can_be_asked_for(cls, loras: Mapping[str, str | Path]) -> Mapping[str, str | Path]:
        return {check_name(name): file for name, file in loras.items()}

    @property
    def of_artifacts(self) -> str:
        """The backend for an artifact: where there are LoRAs, "auto" is the one that they cost least, if it can do what else is
        asked for."""
        can = self.precision == "auto" and (self.device in ("auto", "cpu") or self.device.startswith("cuda"))
        swaps = self.loras and self.backend == "auto" and can and "onnxruntime" in installed()
        return "onnxruntime" if swaps else self.backend

    def for_backend(self, max_batch: int, **changes: Any) -> BackendOptions:
        """What the backend is told of it. Raises ArtifactError."""
        known = {name: getattr(self, name) for name in ("device", "precision", "threads", "autotune")}
        known |= {"loras": {name: str(file) for name, file in self.loras.items()}}
        return BackendOptions(**{**known, **changes}, batches=batch_buckets(max_batch))


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What an engine is made of. max_batch: pictures of one network call."""

    backend: Backend
    tokenizer: PromptTokenizer
    manifest: ModelDescription
    folder: Path
    route: Route
    max_batch: int


def load_model(path: str | Path | None, options: LoadOptions) -> LoadedModel:
    """A model and what draws with it, after checking every file's hash; the graphs of the default size are loaded.

    path: the folder of an artifact, or of a student, which runs in torch; a hub id ("owner/name") is downloaded; None is the
    embedded model. Raises ArtifactError for a folder that is missing, damaged, newer or of another kind,
    MissingExtraError for a backend that is not installed, RequestError for options that the model does not have.
    """
    folder = embedded_folder() if path is None else local_folder(path, revision=options.revision)
    is_student = runs_student(options.backend, folder)
    if options.loras and options.route == "sampler":
        raise RequestError("whole-sampler graphs have their weights for good; load the route 'stages' for loras")
    model = _load_student(folder, options) if is_student else _load_artifact(folder, options)
    model.backend.prepare(kinds_drawn_with(model.manifest, model.route, [max(model.manifest.step_plans)]))
    return model


def kinds_drawn_with(manifest: ModelDescription, route: str, steps: Sequence[int]) -> list[str]:
    """The kinds of graphs that requests of these steps call: whole samplers from embeddings where there are some, since the
    prompt cache knows those."""
    if route == "stages":
        return [*manifest.stages]
    samplers = [f"sampler_{n}" for n in steps]
    from_embeddings = ["text_encoder", *(f"{sampler}_from_embeddings" for sampler in samplers)]
    return from_embeddings if set(from_embeddings) <= set(manifest.graph_names) else samplers


def check_loading(path: str | Path | None, options: LoadOptions, *, here: bool = True) -> None:
    """What loading would find wrong in its first second; a hub id's files, which loading fetches, excepted. here: it is this
    machine that loads it.

    Raises ImagineFlashError."""
    backend_options = options.for_backend(1)
    for name, file in options.loras.items() if here else ():
        if not (Path(file).exists() or HUB_ID.fullmatch(str(file)) or hub_file(str(file))):
            raise ArtifactError(f"lora {name}: there is no {file}; give a .safetensors file, a folder or a hub id")
    folder = EMBEDDED if path is None else Path(path)
    if not folder.exists() and (path is None or HUB_ID.fullmatch(str(path))):
        return
    if runs_student(options.backend, folder):
        check_device("torch", options.device)
        check_max_batch(options.max_batch, STUDENT_BATCHES)
        if here:
            from .backends.torch_modes import check_mode, device_of
            from .backends.torch_quantised import computes_in

            check_mode(options.backend, device_of(options.device))
            computes_in(backend_options, device_of(options.device))
    else:
        manifest = read_artifact_manifest(folder)
        name = choose(options.of_artifacts, manifest, options.device, folder)
        _check_eight_bits(name, options.precision)
        check_device(name, options.device)
        check_max_batch(options.max_batch, manifest.batch)
        if here:
            check_backend(options.of_artifacts, folder, manifest, backend_options)


def embedded_folder() -> Path:
    """That of the embedded model. Raises ArtifactError where it was not installed."""
    if not EMBEDDED.is_dir():
        raise ArtifactError("this installation has no embedded model; give --model PATH or install the wheel")
    return EMBEDDED


def _load_student(folder: Path, options: LoadOptions) -> LoadedModel:
    from .backends.torch import load_student

    max_batch = STUDENT_BATCH if options.max_batch is None else options.max_batch
    check_max_batch(max_batch, STUDENT_BATCHES)
    joins = options.long_prompts == "joined"
    if joins and options.backend not in ("auto", "torch"):
        raise RequestError(f"{options.backend} has networks of one context; joined long_prompts need the backend torch")
    backend, tokenizer, manifest = load_student(folder, options.backend, options.for_backend(max_batch), options.sizes)
    tokenizer = PromptTokenizer(tokenizer.tokenizers, tokenizer.specs, joins=joins)
    return LoadedModel(
        backend=backend, tokenizer=tokenizer, manifest=manifest, folder=folder, route="stages", max_batch=max_batch
    )


def _load_artifact(folder: Path, options: LoadOptions) -> LoadedModel:
    if options.long_prompts == "joined":
        raise RequestError(f"{folder} is an artifact, of one context; joined long_prompts need a student, in torch")
    manifest = read_artifact_manifest(folder)
    route, max_batch = check_route(options.route, manifest), check_max_batch(options.max_batch, manifest.batch)
    name, precision = choose(options.of_artifacts, manifest, options.device, folder), options.precision
    _check_eight_bits(name, precision)
    automatic = precision == "auto" and name == "openvino" and (options.loras or not manifest.holds_int8)
    if automatic and options.device in ("auto", "cpu") and bf16_is_accurate(folder, manifest):
        precision = "bf16"
    backend = load_backend(name, folder, manifest, options.for_backend(max_batch, precision=precision))
    tokenizer = PromptTokenizer.load(folder, manifest.tokenizers)
    return LoadedModel(
        backend=backend,
        tokenizer=tokenizer,
        manifest=manifest,
        folder=folder,
        route=route,
        max_batch=min(max_batch, backend.most_rows or max_batch),
    )


def _check_eight_bits(backend: str, precision: str) -> None:
    if precision == "fp8":
        raise ArtifactError(f"{backend} does not compute in fp8; take a student, which torch draws")
    if precision == "int8" and backend != "openvino":
        raise ArtifactError(
            f"{backend} does not compute in int8; take the backend openvino, and an artifact of: imagine-flash export "
            "STUDENT OUT --format openvino --int8 full; or a student, which torch draws"
        )


def batch_buckets(max_batch: int) -> tuple[int, ...]:
    """The batch sizes that are compiled for where a backend compiles for fixed ones: 1, 2, 4, ... and the largest."""
    powers = [2**i for i in range(max_batch.bit_length())]
    return tuple(sorted({*powers, max_batch}))


def check_route(route: str, manifest: ModelDescription) -> Route:
    """The route of that name, or the only one that the model has. Raises ArtifactError."""
    if route not in ROUTES:
        raise ArtifactError(f"no route {route!r}{nearest(route, ROUTES)}; known: {', '.join(ROUTES)}")
    if "denoiser" not in manifest.graph_names:
        return "sampler"
    return "sampler" if route == "sampler" and f"sampler_{max(manifest.plans)}" in manifest.graph_names else "stages"


def check_max_batch(max_batch: int | None, batch: tuple[int, int]) -> int:
    """The pictures of one network call: those asked for, or the most there may be. Raises RequestError."""
    low, high = batch
    chosen = high if max_batch is None else max_batch
    if not low <= chosen <= high:
        raise RequestError(f"max_batch must be {low} to {high} for this model, got {max_batch!r}")
    return chosen


def check_sizes(sizes: Sequence[Size] | None, manifest: ModelDescription) -> list[Size]:
    """The sizes asked for, or all of the model. Raises RequestError."""
    for size in sizes or ():
        if not manifest.draws((size[0], size[1])):
            known = sizes_text(manifest.sizes, manifest.any_size)
            raise RequestError(f"the artifact has the sizes {known}, got {size_name(size)}")
    return [(size[0], size[1]) for size in sizes or manifest.sizes]
