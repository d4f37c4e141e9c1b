"""The update's kernel with the coefficients of all plans on the device: a turn says rows and uploads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray

from ...core.update import UpdateTable
from ...kernels.update import coefficients_on, noise_corrected_update

MIXED = 1024  # combinations of steps in one batch whose rows stay on the device


class FusedUpdate:
    """x_s = a x + b m + c z for the plans of one model, made once at loading."""

    def __init__(self, tables: Iterable[UpdateTable], device: torch.device) -> None:
        self._coefficients = coefficients_on(device, *tables)
        rows = self._coefficients.rows.cpu().tolist()
        self._row_of = {tuple(values): row for row, values in enumerate(rows)}
        self._mixed: LRUCache[tuple[int, ...], torch.Tensor] = LRUCache(MIXED)

    def __call__(
        self,
        x: torch.Tensor,
        m: torch.Tensor,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        c: NDArray[np.float32] | None = None,
        *,
        noise: torch.Tensor | None = None,
        network_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_s (B, ...) float32; a, b, c (B,): of each image's step. network_input: where x_s is written in its dtype too."""
        c = np.zeros_like(a) if c is None else c
        rows = tuple(self._row_of[values] for values in zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
        index = rows[0] if len(set(rows)) == 1 else self._on_device(rows)
        return noise_corrected_update(x, m, self._coefficients, index, noise=noise, network_input=network_input)

    def _on_device(self, rows: Sequence[int]) -> Any:
        key = tuple(rows)
        if key not in self._mixed:
            self._mixed[key] = torch.tensor(key, dtype=torch.int32).to(self._coefficients.rows.device)
        return self._mixed[key]
