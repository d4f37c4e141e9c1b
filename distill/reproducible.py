"""What makes a training repeatable: its fingerprint, random numbers by position, and batches that any number of processes share."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from ..core.errors import RecipeError


class Part(NamedTuple):
    """One of `count` equal parts of a batch: each process takes its own, and each of its accumulation steps."""

    index: int = 0
    count: int = 1


def rows_of(size: int, part: Part) -> slice:
    """The rows of a batch of `size` that belong to a part. RecipeError where they cannot be equal."""
    if size % part.count:
        raise RecipeError(
            f"fit.batch {size} cannot be split into {part.count} equal parts (processes x fit.accumulate); "
            f"take {-(-size // part.count) * part.count}"
        )
    rows = size // part.count
    return slice(part.index * rows, (part.index + 1) * rows)


def part_of(batch: Any, size: int, part: Part) -> Any:
    """The rows of every tensor of `size` rows in a batch (dicts and tuples of tensors); everything else as it is."""
    if isinstance(batch, dict):
        return {name: part_of(value, size, part) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(part_of(value, size, part) for value in batch)
    if isinstance(batch, torch.Tensor) and batch.ndim and len(batch) == size:
        return batch[rows_of(size, part)]
    return batch


_FREE = {  # how an update is computed, not what it is; and how often a run looks
    *("accumulate", "captured", "gradient_checkpointing"),
    *("checkpoint_minutes", "preview_every", "validate_every", "keep_best", "patience"),
}


def _decisive(recipe: BaseModel, *, fixed_length: bool = False) -> dict[str, Any]:
    """The fields of a recipe and of what it holds, without what a run may change and go on: how it computes, how often it looks,
    and the length where no rate and no draw depends on it."""
    fixed_length = fixed_length or getattr(recipe, "draws_by_length", False)
    fields = recipe.model_dump(mode="json")
    for name in type(recipe).model_fields:
        if isinstance(part := getattr(recipe, name), BaseModel):
            fields[name] = _decisive(part, fixed_length=fixed_length)
    free = _FREE
    if fields.get("schedule") == "constant" and not fixed_length:  # a `fit`
        free = free | {"steps"}
    return {name: value for name, value in fields.items() if name not in free}


def fingerprint(*parts: Any) -> str:
    """A SHA-256 of recipes (without what only says how long and how often) and other values."""
    plain = [_decisive(part) if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def seeded(seed: int, *position: int) -> torch.Generator:
    """A CPU generator that depends on the seed and on every number of the position (step, ...)."""
    state = 0x9E3779B97F4A7C15 ^ seed
    for number in position:
        state = (state * 6364136223846793005 + number * 2 + 1) % 2**63
    return torch.Generator().manual_seed(state)
