"""LoRA files of diffusers, peft and kohya's scripts: read as peft's layers beside a pipeline's weights, or fused into them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

from ..core.errors import ArtifactError, missing_extra
from ..folders.files import known_sha256
from ..folders.hub import HUB_ID, files_on_hub, hub_file, local_folder
from ..folders.loras import Lora, parse_lora
from ..folders.manifests import LORA_FILE, PEFT_CONFIG, FusedLora
from .lora_names import ALPHA, converted_names
from .stages import quiet

PEFT_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of what peft's own save_pretrained writes
WEIGHTS, PICKLES = ".safetensors", (".bin", ".pt", ".pth", ".ckpt")
ADAPTER = "imagine_flash"
IDLE = "No LoRA keys associated to"  # what diffusers warns of wherever a LoRA is of the denoiser alone
__all__ = ["Lora", "fuse", "fused_records", "lora_files", "parse_lora", "place", "take_out"]
Tensors = dict[str, torch.Tensor]
AnyPath = TypeVar("AnyPath", str, Path)


def fuse(pipeline: Any, network: str, lora: Lora) -> None:
    """Adds a LoRA to the weights of the pipeline's networks; none of its tensors may be left over.

    network: the denoiser's component, which names without a component belong to. Raises ArtifactError for what does not
    fit or changes no weight, MissingExtraError.
    """
    layers = place(pipeline, network, lora)
    if not _merge(list(layers.values()), lora.weight):
        raise ArtifactError(f"the LoRA {lora.name} changes no weight: its own, or the weight {lora.weight:g}, are zero")
    take_out(pipeline)


def place(pipeline: Any, network: str, lora: Lora) -> dict[str, Any]:
    """Puts a LoRA's factors beside the weights that they change: peft's layers, called ADAPTER, by the path of the layer that each
    of them wraps, such as unet.mid_block.attentions.0.proj_in. Raises as `fuse`."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise missing_extra("peft", "export") from None
    files = lora_files(lora.name)
    try:
        with quiet(diffusers_warns=True), _without_idle_warnings():
            given = [name for component, file in files.items() for name in _inject(pipeline, network, component, file)]
    except ArtifactError:
        raise
    except Exception as error:  # whatever a file of another model makes the libraries raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise _misfit(lora, pipeline, reason) from error
    factors = [
        (f"{component}.{name}", values)
        for component, module in _modules(pipeline)
        for name, values in module.named_parameters()
        if f".{ADAPTER}" in name
    ]
    if len(factors) < len(given):
        raise _misfit(lora, pipeline, _without_place(given, [name for name, _ in factors]))
    for name, values in factors:
        if not torch.isfinite(values).all():
            raise ArtifactError(f"the LoRA {lora.name} holds NaN or Inf, in {name.partition('.lora_')[0]}")
    return dict(_layers(pipeline))


def take_out(pipeline: Any) -> None:
    """The networks as they were before `place`, but for what was merged; the layers that it gave stay as they are."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    for _, module in _modules(pipeline):
        if getattr(module, "peft_config", None) is None and not any(True for _ in _layers_of(module)):
            continue
        recurse_remove_peft_layers(module)
        for left in ("peft_config", "_hf_peft_config_loaded"):
            module.__dict__.pop(left, None)


def lora_files(name: str) -> dict[str, Path]:
    """The safetensors files of a LoRA, by the component that they are for ("" where the tensors' names say it).

    A file; or a folder or hub id with diffusers' or peft's usual name, one file of another name, or a folder a component; or
    a hub id and a file of it, owner/name/style.safetensors. Of the hub only these files are fetched. Raises ArtifactError.
    """
    path = Path(name)
    if path.is_file():
        return {"": _not_pickled(path)}
    if path.is_dir():
        near = [*path.glob("*"), *path.glob("*/*")]  # as deep as a LoRA's files lie
        there = sorted(file.relative_to(path).as_posix() for file in near if file.is_file())
        return {part: path / file for part, file in _chosen(path, there, "give the path of one of them").items()}
    of_hub = hub_file(name)
    if of_hub is None and not HUB_ID.fullmatch(name):
        raise ArtifactError(f"there is no LoRA {name}; give a .safetensors file, a folder or a hub id")
    hub_id, file = of_hub or (name, None)
    there = files_on_hub(hub_id)
    chosen = _chosen(hub_id, there, f"name one: {hub_id}/FILE") if file is None else {"": _not_pickled(file)}
    if lacking := [one for one in chosen.values() if one not in there]:
        known = _some([one for one in there if one.endswith(WEIGHTS)])
        raise ArtifactError(f"{hub_id} has no {lacking[0]}; its files are {known or 'no LoRAs'}")
    configs = [(PurePosixPath(one).parent / PEFT_CONFIG).as_posix() for one in chosen.values()]
    folder = local_folder(hub_id, only=[*chosen.values(), *configs])
    return {part: folder / one for part, one in chosen.items()}


def _chosen(place: str | Path, there: Sequence[str], way_out: str) -> dict[str, str]:
    """Which of a place's files are the LoRA's, by component. Raises ArtifactError."""
    top = [file for file in there if "/" not in file]
    for usual in (LORA_FILE, PEFT_FILE):
        if usual in top:
            return {"": usual}
    if parts := [file for file in there if re.fullmatch(rf"[^/]+/{re.escape(PEFT_FILE)}", file)]:
        return {file.partition("/")[0]: file for file in parts}
    files = [file for file in top if file.endswith(WEIGHTS)]
    if not files:
        for file in top:
            _not_pickled(f"{place}/{file}")
        raise ArtifactError(f"{place} holds no .safetensors file, so it is no LoRA")
    if len(files) > 1:
        raise ArtifactError(f"{place} holds {_some(files)}; {way_out}")
    return {"": files[0]}


def _some(files: Sequence[str], most: int = 8) -> str:
    return ", ".join(files[:most]) + (f" and {len(files) - most} more" if len(files) > most else "")


def fused_records(lora: Lora) -> list[FusedLora]:
    """What a manifest says of a LoRA: one entry a file."""
    files = lora_files(lora.name).values()
    return [FusedLora(name=file.name, weight=lora.weight, sha256=known_sha256(file)) for file in files]


def _not_pickled(file: AnyPath) -> AnyPath:
    if str(file).endswith(PICKLES):
        raise ArtifactError(
            f"{file} is a pickle, which can run any code and is not read; save it again as .safetensors "
            "(safetensors.torch.save_file)"
        )
    return file


def _inject(pipeline: Any, network: str, component: str, file: Path) -> list[str]:
    """Adds a file's tensors beside the weights that they change; what those are called in diffusers that must have got a place."""
    from safetensors.torch import load_file

    whole = load_file(file)
    tensors = {name: values for name, values in whole.items() if not name.endswith(ALPHA)}
    first = {name.removeprefix(PEFT_PREFIX).split(".")[0] for name in tensors}
    module: Any = getattr(pipeline, component or network, None)
    if any(name.startswith(PEFT_PREFIX) for name in tensors):
        if module is None:
            raise ArtifactError(f"{file.parent}: the {type(pipeline).__name__} has no {component}")
        _inject_peft(module, {name.removeprefix(PEFT_PREFIX): values for name, values in tensors.items()}, file)
    elif all(hasattr(module, name) for name in first):  # of `unet.save_lora_adapter`: names without the component
        module.load_lora_adapter(str(file), prefix=None, adapter_name=ADAPTER)
    elif hasattr(reader := _reader(pipeline), "load_lora_weights"):
        reader.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER, local_files_only=True)
        return converted_names(reader, whole)
    else:
        raise ArtifactError(f"{file}: diffusers reads no LoRA of a {type(pipeline).__name__}; save it with peft")
    return [f"{component or network}.{name.removeprefix(PEFT_PREFIX)}" for name in tensors]


def _reader(pipeline: Any) -> Any:
    """diffusers' pipeline of a T2I-adapter for Stable Diffusion 1.x and 2.x reads no LoRA; the plain one of the same parts does."""
    if type(pipeline).__name__ != "StableDiffusionAdapterPipeline":
        return pipeline
    from diffusers import StableDiffusionPipeline

    parts = {name: part for name, part in pipeline.components.items() if name != "adapter"}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _inject_peft(module: torch.nn.Module, tensors: Tensors, file: Path) -> None:
    """As peft loads what its save_pretrained wrote: alpha is in its config alone."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if not (file.parent / PEFT_CONFIG).is_file():
        raise ArtifactError(
            f"{file} does not say how strong it is: peft keeps that in {PEFT_CONFIG}; put it beside the file, or give the folder "
            "or hub id that holds both"
        )
    kind = json.loads((file.parent / PEFT_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise ArtifactError(f"{file.parent} is a {kind} of peft; only LORA is read")

    if not hasattr(module, "text_model"):  # transformers 5 took this level out of CLIP's text models
        tensors = {name.removeprefix("text_model."): values for name, values in tensors.items()}
    config = LoraConfig.from_pretrained(str(file.parent))
    inject_adapter_in_model(config, module, adapter_name=ADAPTER, state_dict=tensors)
    set_peft_model_state_dict(module, tensors, adapter_name=ADAPTER)


def _merge(layers: Sequence[Any], weight: float) -> bool:
    """Makes one weight of each two; whether any is another than before."""
    changed = False
    for layer in layers:
        kept: torch.Tensor = layer.get_base_layer().weight
        before = torch.hash_tensor(kept.detach())
        layer.scale_layer(weight)
        layer.merge(adapter_names=[ADAPTER])
        changed |= bool(torch.hash_tensor(kept.detach()) != before)
    return changed


def _layers(pipeline: Any) -> Iterator[tuple[str, Any]]:
    return (
        (f"{component}.{name}", layer) for component, module in _modules(pipeline) for name, layer in _layers_of(module)
    )


def _layers_of(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))


@contextmanager
def _without_idle_warnings() -> Iterator[None]:
    logger, is_worth_it = (
        logging.getLogger("diffusers.loaders.lora_base"),
        lambda record: IDLE not in record.getMessage(),
    )
    logger.addFilter(is_worth_it)
    try:
        yield
    finally:
        logger.removeFilter(is_worth_it)


def _modules(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    components: Mapping[str, Any] = pipeline.components
    return ((name, part) for name, part in components.items() if isinstance(part, torch.nn.Module))


def _without_place(given: Sequence[str], placed: Sequence[str]) -> str:
    """How many have a place; and one that has none, of those that are called as peft calls them."""
    if not placed:
        return f"none of its {len(given)} tensors have a place there"
    layers = {_layer_of(name) for name in placed}
    lost = next((name for name in given if ".lora_A." in name and _layer_of(name) not in layers), None)
    named = "" if lost is None else f"{lost} has no place, "
    return f"{named}only {len(placed)} of its {len(given)} tensors have a place there"


def _layer_of(tensor: str) -> str:
    """Transformers 5 took the level text_model out of CLIP's text models."""
    return tensor.partition(".lora_")[0].replace(".text_model.", ".")


def _misfit(lora: Lora, pipeline: Any, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the LoRA {lora.name} does not fit this {type(pipeline).__name__}: {reason}; was it made for another model?"
    )
