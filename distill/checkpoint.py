"""Checkpoints of a training: one safetensors file with weights, EMA, Adam moments and the step. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.artifact import atomic_file
from ..core.errors import ArtifactError

_VERSION = "1"


def save_checkpoint(
    path: Path,
    *,
    module: torch.nn.Module,
    ema: EMAModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    task: str,
) -> None:
    """Write the whole state of a training after `step` updates; a kill while writing leaves the previous file whole."""
    tensors = {f"weight.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"ema.{i}": value for i, value in enumerate(ema.shadow_params)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors = {name: value.detach().contiguous().cpu().clone() for name, value in tensors.items()}
    metadata = {
        "version": _VERSION,
        "task": task,
        "step": str(step),
        "seconds": str(seconds),
        "ema_updates": str(ema.optimization_step),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)


def load_checkpoint(
    path: Path, *, module: torch.nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, task: str
) -> tuple[int, float]:
    """Restore what save_checkpoint wrote; returns updates and seconds so far. ArtifactError for a file of another run."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is not a readable checkpoint ({error}); delete it to start this stage again"
        ) from None
    if metadata.get("task") != task or metadata.get("version") != _VERSION:
        raise ArtifactError(
            f"{path} is a checkpoint of {json.dumps(metadata)}, not of {task}; delete it or choose another OUT"
        )
    try:
        module.load_state_dict(
            {name.removeprefix("weight."): v for name, v in tensors.items() if name.startswith("weight.")}
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(
            f"{path} was made with other sizes ({reason}); delete it or use the recipe it was made with"
        ) from None
    for i, shadow in enumerate(ema.shadow_params):
        shadow.copy_(tensors[f"ema.{i}"])
    ema.optimization_step = int(metadata["ema_updates"])
    _load_adam(optimizer, tensors)
    return int(metadata["step"]), float(metadata.get("seconds", 0))


def _load_adam(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
