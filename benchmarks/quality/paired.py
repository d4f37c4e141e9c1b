"""Distances with intervals, and what lies between two rows that drew the same prompts from the same noises."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .measure import Measured
from .metrics import frechet_distances, kernel_terms, unbiased_frechet_distance

RESAMPLES = 500  # draws of a bootstrap
Moments = tuple[np.ndarray, np.ndarray]  # mean and covariance of the reference


class Distance(NamedTuple):
    """FD (judge) of a row as infinitely many pictures would have it, and those of bootstrap samples, moved to lie about it.
    Draw k takes the same prompts whatever the row, so that differences of draws are paired. plain: as these pictures have it;
    of two rows the bias is the same, and the extrapolation's own noise is not. terms: what each prompt adds to KD (judge)."""

    value: float
    draws: np.ndarray
    plain: float
    terms: np.ndarray | None = None

    @property
    def interval(self) -> list[float]:
        """Of 95 %."""
        return [round(float(v), 3) for v in np.percentile(self.draws, (2.5, 97.5))]


def distance_of(features: np.ndarray, reference: Moments, real: np.ndarray | None = None) -> Distance:
    """The distance of features (N, D) to the reference. real: features of rendered scenes, of the same prompts, for KD (judge)."""
    value, draw = unbiased_frechet_distance(features, *reference), np.random.default_rng(0)
    samples = (features[draw.integers(len(features), size=len(features))] for _ in range(RESAMPLES))
    plain, *found = frechet_distances((features, *samples), *reference)
    terms = None if real is None else kernel_terms(features[: len(real)], real)
    return Distance(value, value + np.array(found) - np.mean(found), plain, terms)


def against_teacher(ours: Measured, teacher: Measured, own: Distance, best: Distance) -> dict[str, Any]:
    """With paired 95 % intervals: FD by ratio, fidelity in points; and latents by squared error."""
    result: dict[str, Any] = {
        "fd_ratio": _with_interval(own.value / best.value, own.draws / best.draws),
        "fidelity_difference": fidelity_difference(ours, teacher),
    }
    if ours.latents.shape == teacher.latents.shape:
        own_latents, wanted = ours.latents.astype(np.float32), teacher.latents.astype(np.float32)
        result["error_to_teacher"] = round(float(np.square(own_latents - wanted).mean() / wanted.var()), 4)
    return result


def between(ours: Measured, other: Measured, own: Distance, theirs: Distance) -> dict[str, Any]:
    """How much farther from real scenes one row is than another, and how much more of its prompts it shows, with paired 95 %
    intervals."""
    draws, plain = own.draws - theirs.draws, own.plain - theirs.plain
    found = {
        "fd_difference": _with_interval(plain, draws - draws.mean() + plain),
        "fidelity_difference": fidelity_difference(ours, other),
    }
    if own.terms is not None and theirs.terms is not None:
        terms = own.terms - theirs.terms
        half = 1.96 * 2 * terms.std(ddof=1) / np.sqrt(len(terms))
        found["kd_difference"] = [round(float(v), 4) for v in (terms.mean(), terms.mean() - half, terms.mean() + half)]
    return found


def fidelity_difference(ours: Measured, other: Measured) -> list[float]:
    """The mean difference of "all" with its paired 95 % interval."""
    return mean_difference(ours.marks[:, -1].astype(np.float64), other.marks[:, -1])


def mean_difference(ours: np.ndarray, other: np.ndarray) -> list[float]:
    """Of numbers (N,) of the same prompts, with its paired 95 % interval."""
    gain = ours - other
    rows = np.random.default_rng(1).integers(len(gain), size=(1000, len(gain)))
    return _with_interval(gain.mean(), gain[rows].mean(1))


def _with_interval(value: float, draws: np.ndarray) -> list[float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return [round(float(v), 4) for v in (value, low, high)]
