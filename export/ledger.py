"""What the gate allows, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.images import psnr

if TYPE_CHECKING:
    import torch

    from .cases import Case

Errors = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a graph may differ from torch by. error: largest absolute difference of embeddings, m and latents, of the
    largest value beyond 1; rms: their relative RMS difference; levels: of a pixel (0..255); psnr: of an image, dB."""

    error: float = np.inf
    rms: float = np.inf
    levels: float = np.inf
    psnr: float = 0.0


LIMITS = {
    "fp32": Limits(error=1e-4, levels=1),
    "fp16": Limits(rms=0.02, psnr=35.0),
    "bf16": Limits(rms=0.15, psnr=20.0),
    "int8": Limits(psnr=20.0),
}


@dataclass(frozen=True)
class Failure:
    """A difference beyond the limits; the images where it shows in images."""

    message: str
    graph: str
    case: Case
    steps: int | None = None
    got: NDArray[np.uint8] | None = None  # (B, H, W, 3)


@dataclass
class Ledger:
    """The worst figures of every graph, and everything beyond the limits."""

    limits: Limits
    errors: Errors = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def compare(self, graph: str, kind: str, got: NDArray[Any], expected: torch.Tensor, case: Case) -> None:
        """float32 tensors."""
        difference, rms = _difference(got, expected)
        scale = max(1.0, float(expected.abs().max()))
        self._keep(graph, kind, difference)
        self._keep(graph, f"{kind}_rms", rms)
        limit = self.limits.error * scale
        if not difference <= limit:  # also true for NaN
            self._fail(f"{graph}: {kind} differ from torch by {difference:.3g}, more than {limit:.3g}", graph, case)
        elif not rms <= self.limits.rms:
            self._fail(
                f"{graph}: {kind} differ from torch by {rms:.2%} RMS, more than {self.limits.rms:.2%}", graph, case
            )

    def compare_images(self, graph: str, pictures: Sequence[NDArray[Any]], case: Case, steps: int) -> None:
        """pictures: uint8 images, and whether the graph found them finite, as torch's are."""
        got, finite = pictures
        expected = case.images[steps]
        levels, _ = _difference(got, expected)
        db = min((psnr(one, other) for one, other in zip(got, expected.numpy(), strict=True)), default=0.0)
        self._keep(graph, "images", levels)
        self._keep(graph, "psnr", db, worst=min)
        problem = ""
        if not finite.all():
            problem = "NaN or Inf, where torch has none"
        elif not levels <= self.limits.levels:
            problem = f"images differ from torch by {levels:g} of 255, more than {self.limits.levels:g}"
        elif db < self.limits.psnr:
            problem = f"images have a PSNR of {db:.1f} dB against torch, less than {self.limits.psnr:g}"
        if problem:
            self._fail(f"{graph}: {problem}", graph, case, steps, got)

    def _keep(self, graph: str, kind: str, value: float, worst: Callable[[float, float], float] = max) -> None:
        kinds = self.errors.setdefault(graph, {})
        kinds[kind] = worst(value, kinds.get(kind, value))

    def _fail(self, what: str, graph: str, case: Case, steps: int | None = None, got: Any = None) -> None:
        self.failures.append(Failure(f"{what} ({case})", graph, case, steps, got))


def _difference(got: NDArray[Any], expected: torch.Tensor) -> tuple[float, float]:
    """The largest absolute difference and the relative RMS difference; NaN where either is NaN."""
    if got.shape != tuple(expected.shape):
        return float("inf"), float("inf")
    want = expected.numpy().astype(np.float64)
    difference = got.astype(np.float64) - want
    rms = np.sqrt(np.square(difference).mean()) / max(np.sqrt(np.square(want).mean()), 1e-12)
    return float(np.abs(difference).max()), float(rms)
