"""ControlNets and T2I-adapters, which read a conditioning picture beside the prompt: what their configs say, and what they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ArtifactError
from ..folders.reading import read_config

CONTROLNET, ADAPTER = "ControlNetModel", "T2IAdapter"  # diffusers' classes
PARTS = {CONTROLNET: "controlnet", ADAPTER: "adapter"}  # what diffusers' pipelines call the component
KINDS = {CONTROLNET: "ControlNet", ADAPTER: "T2I-adapter"}
FAMILIES = {
    "StableDiffusionPipeline": "StableDiffusion",
    "LatentConsistencyModelPipeline": "StableDiffusion",
    "StableDiffusionXLPipeline": "StableDiffusionXL",
}
PIPELINES = {  # diffusers' classes of such pipelines, by family and network
    (family, kind): f"{family}{kind.removesuffix('Model').removeprefix('T2I')}Pipeline"
    for family in FAMILIES.values()
    for kind in PARTS
}
CONTROLLED = FAMILIES | {
    name: family for (family, _), name in PIPELINES.items()
}  # the family of every class that takes one
SHARED = {  # what a ControlNet must have as its UNet has it, with both classes' defaults
    "in_channels": 4,
    "cross_attention_dim": 1280,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
}
Maps = list[tuple[int, int]]  # channels, and pixels of the picture's side for each place


def control_class(folder: Path) -> str:
    """Which of the two a network's folder holds, by its config. Raises ArtifactError for one of another class."""
    if not folder.is_dir():
        raise ArtifactError(f"there is no ControlNet {folder}; give its folder or a hub id")
    name = str(read_config(folder / "config.json").get("_class_name"))
    if name not in PARTS:
        raise ArtifactError(f"{folder} holds a {name}; a ControlNet is a folder of a {CONTROLNET} or a {ADAPTER}")
    return name


def is_controlled(student: Path) -> bool:
    """Whether a student's folder has one as a component."""
    return any(path for part in PARTS.values() for path in student.glob(f"**/{part}/config.json"))


def check_takes_control(pipeline: str) -> None:
    """Raises ArtifactError for a pipeline's class that goes with neither."""
    if pipeline not in CONTROLLED:
        raise ArtifactError(f"a {pipeline} takes no ControlNet or T2I-adapter here; {', '.join(FAMILIES)} do")


def controlled_pipeline(pipeline: str, kind: str) -> str:
    """diffusers' class of such a pipeline with a network of the class `kind`."""
    return PIPELINES[CONTROLLED[pipeline], kind]


def check_control(kind: str, config: Mapping[str, Any], unet: Mapping[str, Any], downscale: int = 8) -> None:
    """Raises ArtifactError for a network that does not read pictures of three channels, or was made for another UNet.

    config, unet: both networks' configs. downscale: pixels of a picture's side per latent.
    """
    if kind not in PARTS:
        raise ArtifactError(f"one {CONTROLNET} or {ADAPTER} reads the conditioning picture here, not a {kind}")
    (_check_controlnet if kind == CONTROLNET else _check_adapter)(config, unet, downscale)


def _check_controlnet(config: Mapping[str, Any], unet: Mapping[str, Any], downscale: int) -> None:
    channels = config.get("conditioning_channels", 3)
    if channels != 3:
        raise ArtifactError(f"the ControlNet reads pictures of {channels} channels; only those of 3 are drawn with")
    if config.get("global_pool_conditions") or config.get("class_embed_type") or config.get("encoder_hid_dim_type"):
        raise ArtifactError("the ControlNet pools its picture or is told more than the text; such ones are not read")
    for key, default in SHARED.items():
        own, wanted = (_plain(each.get(key, default)) for each in (config, unet))
        if own != wanted:
            raise ArtifactError(
                f"the ControlNet was made for another base: its {key} is {own}, the unet's {wanted}; give one of "
                "this model's family"
            )
    stages = len(config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256))
    if 2 ** (stages - 1) != downscale:
        raise ArtifactError(
            f"the ControlNet reads one place in {2 ** (stages - 1)} pixels, the decoder has {downscale}"
        )


def _check_adapter(config: Mapping[str, Any], unet: Mapping[str, Any], downscale: int) -> None:
    channels = config.get("in_channels", 3)
    if channels not in (1, 3):
        raise ArtifactError(f"the T2I-adapter reads pictures of {channels} channels; those of 3 or 1 are drawn with")
    given, taken = feature_maps(config), _taken(unet, downscale)
    if given != taken[: len(given)] or len(given) < len(taken) - 1:
        raise ArtifactError(
            f"the T2I-adapter was made for another base: it gives {_listed(given)}, the unet takes {_listed(taken)} (channels/"
            "pixels); give one of this model's family"
        )


def feature_maps(config: Mapping[str, Any]) -> Maps:
    """The feature maps of an adapter, by its type (diffusers' FullAdapter, FullAdapterXL, LightAdapter)."""
    channels, kind = list(config.get("channels", (320, 640, 1280, 1280))), config.get("adapter_type", "full_adapter")
    side = config.get("downscale_factor", 8)
    if kind == "full_adapter_xl":
        return [(each, side * (1 if i < 2 else 2)) for i, each in enumerate(channels)]
    return [(each, side * 2**i) for i, each in enumerate([*channels, *channels[-1:] * (kind == "light_adapter")])]


def _taken(unet: Mapping[str, Any], downscale: int) -> Maps:
    """Where a UNet adds them: to what its down blocks with attention give before they halve it, to what the others give after;
    and to its middle."""
    channels, kinds = unet["block_out_channels"], unet["down_block_types"]
    last = len(channels) - 1
    levels = [i if "CrossAttn" in kind else min(i + 1, last) for i, kind in enumerate(kinds)]
    return [
        (each, downscale * 2**level) for each, level in zip([*channels, channels[-1]], [*levels, last], strict=True)
    ]


def _listed(maps: Maps) -> str:
    return ", ".join(f"{channels}/{pixels}" for channels, pixels in maps)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
