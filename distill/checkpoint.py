"""Checkpoints of a training: one safetensors file with weights, EMA, moments and the step. Nothing is pickled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open

from ..core.errors import ArtifactError
from .sharding import part_like, whole
from .tensors import write_tensors

_VERSION = "3"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds. `fingerprint` is of all that makes two trainings different: recipe, seed, teacher, data."""

    module: torch.nn.Module
    ema: EMAModel
    optimizers: Sequence[torch.optim.Optimizer]
    task: str
    fingerprint: str
    frozen: frozenset[str] = frozenset()  # weights that are the same before and after, and not stored


def save_checkpoint(path: Path, state: TrainingState, *, step: int, seconds: float, write: bool = True) -> None:
    """Write the state after `step` updates; a kill while writing leaves the previous file whole. ArtifactError where
    it cannot be written.

    Weights that are shared out are whole in the file, so that any number of processes goes on with it: all of them must call
    this, and one has `write`.
    """
    weights = state.module.state_dict().items()
    tensors = {f"weight.{name}": value for name, value in weights if name not in state.frozen}
    tensors |= {f"ema.{i}": value for i, value in enumerate(state.ema.shadow_params)}
    for place, optimizer in enumerate(state.optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"moments{place}.{index}.{key}": torch.as_tensor(value) for key, value in _flat(moments)}
    tensors = {name: _plain(value, write) for name, value in tensors.items()}
    if not write:
        return
    known: set[int] = set()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if place in known else value  # safetensors writes nothing twice
        known.add(place)
    numbers = {"step": step, "seconds": seconds, "ema_updates": state.ema.optimization_step}
    metadata = {"version": _VERSION, "task": state.task, "fingerprint": state.fingerprint}
    write_tensors(path, tensors, metadata | {name: str(value) for name, value in numbers.items()})


def load_checkpoint(path: Path, state: TrainingState) -> tuple[int, float]:
    """Restore what save_checkpoint wrote; returns updates and seconds so far. ArtifactError for a file of another run."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is not a readable checkpoint ({error}); delete it to start this stage again"
        ) from None
    expected = {"version": _VERSION, "task": state.task, "fingerprint": state.fingerprint}
    if any(metadata.get(name) != value for name, value in expected.items()):
        raise ArtifactError(
            f"{path} belongs to another recipe, teacher or version; choose another OUT, or delete the folder {path.parents[1]}"
        )
    weights = {name[7:]: value for name, value in tensors.items() if name.startswith("weight.")}
    own = state.module.state_dict()
    weights = {name: part_like(value, own[name]) if name in own else value for name, value in weights.items()}
    unknown = state.module.load_state_dict(weights, strict=False)
    assert not unknown.unexpected_keys and set(unknown.missing_keys) <= state.frozen
    for i, shadow in enumerate(state.ema.shadow_params):
        shadow.copy_(part_like(tensors[f"ema.{i}"], shadow))
    state.ema.optimization_step = int(metadata["ema_updates"])
    for place, optimizer in enumerate(state.optimizers):
        _load_moments(optimizer, f"moments{place}", tensors)
    return int(metadata["step"]), float(metadata["seconds"])


def _plain(value: torch.Tensor, write: bool) -> torch.Tensor:
    """All of it in the host's memory, where it is to be written."""
    value = whole(value.detach())
    return value.contiguous().cpu() if write else value[:0] if value.ndim else value


def _flat(moments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; bitsandbytes keeps some in a dict of their own, which it does not need back."""
    for name, value in moments.items():
        yield from value.items() if isinstance(value, dict) else [(name, value)]


def _load_moments(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        place, *rest = name.split(".")
        if place == prefix:
            counts = value.ndim == 0 and not value.is_floating_point()  # a number of updates that was a plain int
            own = int(value) if counts else part_like(value, weights[int(rest[0])])
            state.setdefault(int(rest[0]), {})[rest[1]] = own
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
