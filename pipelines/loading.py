"""From a student or a teacher (a folder or a hub id, whole or a LoRA) to its pipeline and its stages."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.diffusers_samplers import sampler_of
from ..core.errors import ArtifactError, ScheduleError, missing_extra
from ..core.schedule import NoiseSchedule
from ..folders.files import STUDENT_FILE
from ..folders.hub import local_folder
from ..folders.manifests import PIPELINE_FILE, SCHEDULER_FILE, StudentManifest
from ..folders.reading import read_config, read_student_manifest
from ..models.files import TOLD, pipeline_files
from .architectures import Architecture, architecture_of, stages_of
from .half import compute_in_float32, stored_dtype, variant_of
from .lora import Lora, fuse
from .stages import Stages, quiet

UPCASTS = "StableDiffusionXL"  # the family of diffusers' pipelines that heed the vae's force_upcast


def student_folder(student: str | Path) -> Path:
    """The folder of a student; a hub id is downloaded, but for what no student needs. Raises ArtifactError."""
    only = pipeline_files(local_folder(student, only=TOLD))
    return local_folder(student, ignore=["*.onnx*", "*.bin"], only=only)


def load_stages(student: str | Path, **options: Any) -> Stages:
    """The stages of `load_student_pipeline`, which takes the options."""
    return stages_of(load_student_pipeline(student, **options))


def load_student_pipeline(
    student: str | Path,
    *,
    tiny_decoder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    loras: Sequence[Lora] = (),
    keep_half: bool = False,
    variant: str | None = None,
) -> Any:
    """Loads a student folder's diffusers pipeline; its own LoRA weights and then `loras` are fused, in float32.

    tiny_decoder: an AutoencoderTiny folder that takes the decoder's place. dtype: of the networks, but for what diffusers
    and transformers keep in float32 because half precision does not hold it. keep_half: what is stored in half precision
    stays so in memory, and computes in float32; not where LoRAs are fused. variant: of the weights' files, such as "fp16".
    Raises ArtifactError for a folder that does not load or a class that is not known, ScheduleError for a schedule
    without a closed form (before any weight is read), MissingExtraError.
    """
    folder = Path(student)
    described = read_student_manifest(folder)
    loras = [*([Lora(str(folder))] if described.base is not None else []), *loras]
    base = folder if described.base is None else _base_folder(folder, described)
    if (base / PIPELINE_FILE).is_file():
        _check_sampler(described, read_config(base / SCHEDULER_FILE))
    pipeline = load_pipeline(
        base, dtype=torch.float32 if loras else dtype, keep_half=keep_half and not loras, variant=variant
    )
    name = type(pipeline).__name__
    for lora in loras:
        fuse(pipeline, architecture_of(name).network, lora)
    if loras:
        pipeline.to(dtype)
    if tiny_decoder is not None:
        pipeline.vae = _load_tiny(tiny_decoder)
    if dtype == torch.float16 and name.startswith(UPCASTS) and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.to(torch.float32)
    return pipeline


def load_pipeline(
    source: str | Path, *, dtype: torch.dtype = torch.float32, keep_half: bool = False, variant: str | None = None
) -> Any:
    """The diffusers pipeline of a folder or hub id, with those components alone that its stages are made of.

    dtype, keep_half and variant as in `load_student_pipeline`.
    Raises ArtifactError for a folder that does not load or a class that is not known, ScheduleError for a schedule
    without a closed form (before any weight is read), MissingExtraError.
    """
    folder = student_folder(source)
    index = read_config(folder / PIPELINE_FILE)
    architecture = architecture_of(str(index.get("_class_name")))
    NoiseSchedule.from_scheduler_config(read_config(folder / SCHEDULER_FILE))
    unused = {
        part: None
        for part in index
        if not part.startswith("_") and part not in architecture.components
        if isinstance(index[part], list)
    }
    halves = _half_networks(folder, architecture, variant) if keep_half else {}
    pipeline = _load(folder, unused, {"default": dtype, **halves}, variant)
    for part in halves:
        compute_in_float32(getattr(pipeline, part))
    return pipeline


def _base_folder(folder: Path, described: StudentManifest) -> Path:
    """A base is a folder, absolute or beside the student's files, or a hub id."""
    assert described.base is not None
    beside = folder / described.base
    return beside if beside.is_dir() else student_folder(described.base)


def _check_sampler(described: StudentManifest, scheduler: dict[str, Any]) -> None:
    """A folder that somebody described by hand may name no sampler: then its scheduler must be a deterministic one.

    Raises ArtifactError. A student of ours was trained for its sampler, whatever scheduler its teacher came with.
    """
    if described.recipe or "sampler" in described.model_fields_set:
        return
    name = scheduler.get("_class_name")
    try:
        sampler = sampler_of(scheduler)
        if (sampler.kind, sampler.boundary) == ("deterministic", None):
            return
        known = json.dumps(sampler.model_dump(exclude_defaults=True))
        reason = f'is {name}, whose steps are not those of DDIM: add "sampler": {known}'
    except ScheduleError as error:
        reason = f'does not tell which sampler the model was trained for ({error}): add "sampler": {{"kind": "deterministic"}}'
    raise ArtifactError(f"the scheduler {reason}, or another one, to {STUDENT_FILE}")


def _half_networks(folder: Path, architecture: Architecture, variant: str | None) -> dict[str, torch.dtype]:
    """The networks that are stored in half precision, but for the vae, which is small beside its activations."""
    heavy = ("text_encoder", architecture.control or "text_encoder")
    networks = [architecture.network, *(part for part in architecture.parts if part.startswith(heavy))]
    found = {part: stored_dtype(folder / part, variant) for part in networks}
    return {part: dtype for part, dtype in found.items() if dtype != torch.float32}


def _load(folder: Path, unused: dict[str, None], dtype: dict[str, torch.dtype], variant: str | None) -> Any:
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except ImportError:
        raise missing_extra("diffusers", "export") from None
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    try:
        with quiet():
            texts = _load_texts(folder, unused, dtype, variant, options)
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder), dtype=dtype, variant=variant, **options, **unused, **texts
            )
    except ArtifactError:
        raise
    except Exception as error:  # whatever a damaged folder makes the libraries raise
        there = sorted({found for path in folder.glob("*/*.safetensors") if (found := variant_of(path))})
        hint = f"; it holds the variant {' and '.join(there)}: add --variant" if there and variant not in there else ""
        raise ArtifactError(f"{folder} does not load in diffusers: {first_line(error)}{hint}") from error
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            _check_whole(folder / part, [name for name, values in module.named_parameters() if values.is_meta])
    return pipeline


def _load_texts(
    folder: Path, unused: Collection[str], dtype: dict[str, torch.dtype], variant: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The networks of transformers, which makes up what a file lacks: diffusers' pipeline does not hand on that it did.

    Raises ArtifactError for one that is not whole, and what transformers raises.
    """
    import transformers

    found: dict[str, Any] = {}
    for part, kind in read_config(folder / PIPELINE_FILE).items():
        if part in unused or not isinstance(kind, list) or kind[:1] != ["transformers"]:
            continue
        network: Any = getattr(transformers, str(kind[-1]), None)
        if transformers.PreTrainedModel not in getattr(network, "__mro__", ()):
            continue
        own = variant if variant is not None and any((folder / part).glob(f"*.{variant}*")) else None
        found[part], report = network.from_pretrained(
            str(folder / part),
            dtype=dtype.get(part, dtype["default"]),
            variant=own,
            output_loading_info=True,
            **options,
        )
        _check_whole(folder / part, report["missing_keys"])
    return found


def _check_whole(part: Path, missing: Collection[str]) -> None:
    """Raises ArtifactError that names a tensor which the files of a network lack."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArtifactError(
            f"{part} lacks the weights {min(missing)}{more}; fetch it again, or save it whole with diffusers' save_pretrained"
        )


def _load_tiny(folder: Path) -> Any:
    from diffusers import AutoencoderTiny

    try:
        with quiet():
            vae: Any = AutoencoderTiny.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
    except Exception as error:
        raise ArtifactError(f"{folder} is no AutoencoderTiny: {first_line(error)}") from error
    _check_whole(folder, [name for name, values in vae.named_parameters() if values.is_meta])
    return vae


def first_line(error: Exception) -> str:
    """What a library's error says, as far as it goes into one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
