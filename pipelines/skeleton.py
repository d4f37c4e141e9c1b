"""What a pipeline's networks are made of, without their weights: enough to read a LoRA for a model whose weights are elsewhere."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ArtifactError
from ..folders.files import NETWORKS_FILE
from .architectures import architecture_of
from .stages import Stages, quiet


def write_networks(folder: Path, pipeline: Any, stages: Stages) -> None:
    """Writes the config of the denoiser and of each text encoder, and where its layers are among the modules of a stage, which
    is what the nodes of its graph are called."""
    network = architecture_of(stages.pipeline).network
    inside = {id(module): path for path, module in stages.text_encoder.named_modules()}
    described = {}
    for name, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module) or (name != network and id(module) not in inside):
            continue
        described[name] = {
            "library": type(module).__module__.partition(".")[0],
            "class": type(module).__name__,
            "path": name if name == network else inside[id(module)],
            "config": _config(module),
        }
    text = json.dumps({"pipeline": stages.pipeline, "networks": described}, indent=1, sort_keys=True)
    (folder / NETWORKS_FILE).write_text(text + "\n", encoding="utf-8")


def read_networks(folder: Path) -> tuple[Any, dict[str, str]]:
    """A pipeline of these networks, whose weights are whatever lay in memory and take none before they are written; and by
    component the path of its layers among the modules of its stage. Raises ArtifactError."""
    import diffusers

    file = folder / NETWORKS_FILE
    if not file.is_file():
        raise ArtifactError(
            f"{folder} does not say what its networks are made of, which LoRAs are read by: export the student again; or fuse "
            "them: imagine-flash export --lora"
        )
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        architecture_of(known["pipeline"])
        with quiet():
            pipeline_class = getattr(diffusers, known["pipeline"])
            networks = {name: _network(one) for name, one in known["networks"].items()}
            wanted = inspect.signature(pipeline_class.__init__).parameters
            flags = {name: False for name in ("requires_safety_checker", "add_watermarker") if name in wanted}
            others = {
                name: None for name, one in wanted.items() if name != "self" and one.default is inspect.Parameter.empty
            }
            pipeline = pipeline_class(**{**others, **flags, **networks})
    except Exception as error:  # of another version of the libraries
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"the networks of {folder} cannot be built here ({reason}); export the student again"
        ) from error
    return pipeline, {name: one["path"] for name, one in known["networks"].items()}


def _network(described: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    library = {"diffusers": diffusers, "transformers": transformers}[described["library"]]
    kind: Any = getattr(library, described["class"])
    if torch.nn.Module not in kind.__mro__:
        raise ValueError(f"{described['class']} is no network")
    with torch.device("meta"):
        if described["library"] == "diffusers":
            module = kind.from_config(described["config"])
        else:
            module = kind(kind.config_class.from_dict(described["config"]))
    return module.to_empty(device="cpu")


def _config(module: Any) -> dict[str, Any]:
    """Without private keys, which may hold paths."""
    config = json.loads(
        module.to_json_string() if hasattr(module, "to_json_string") else module.config.to_json_string()
    )
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
