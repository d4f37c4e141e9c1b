"""One row of the quality table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .prompts import Prompts

Latents = torch.Tensor | None
REFERENCE = "teacher, 25 steps"  # the row that all others are compared with


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a row draws the pictures of prompts, (N, H, W, 3) uint8, and their latents (None: it has none)."""

    name: str
    network_calls: int
    draw: Callable[[Prompts], tuple[np.ndarray, Latents]]
    shown: bool = False  # in the grid of pictures
