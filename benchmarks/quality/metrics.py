"""Distances between sets of pictures, given as features (N, D) in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

SUBSET_SIZES, SUBSETS = 10, 32  # of the extrapolation to infinitely many pictures


def frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of Gaussians (Heusel et al. 2017, eq. 6); features (N, D) against a reference."""
    return frechet_distances([features], mean, covariance)[0]


def frechet_distances(samples: Iterable[np.ndarray], mean: np.ndarray, covariance: np.ndarray) -> list[float]:
    """The same of several sets of features against one reference."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    def distance(features: np.ndarray) -> float:
        own_mean, own = features.mean(0), np.cov(features, rowvar=False)
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ own @ root), 0, None)).sum()
        return float(((own_mean - mean) ** 2).sum() + np.trace(own) + np.trace(covariance) - 2 * cross)

    return [distance(features) for features in samples]


def unbiased_frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The distance that infinitely many samples would have (Chong & Forsyth 2020, section 4): subsets of several sizes are
    measured, and the line through distance against 1 / size is read at 0. features (N, D), N at least 2 (D + 1)."""
    count, dimensions = features.shape
    draw = np.random.default_rng(0)
    sizes = np.linspace(max(count // 4, dimensions + 1), count, SUBSET_SIZES).astype(int)
    subsets = (features[draw.permutation(count)[:size]] for size in sizes for _ in range(SUBSETS))
    distances = np.reshape(frechet_distances(subsets, mean, covariance), (SUBSET_SIZES, SUBSETS)).mean(1)
    return float(np.polyfit(1.0 / sizes, distances, 1)[1])


def unbiased_sample_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """The same of two sets of samples (N, D) and (M, D), of both of which there are finitely many: subsets of several sizes of
    each, extrapolated. Row i of sets of one length may be of one prompt, so a measured pair of subsets has no row in common.
    The smaller set has at least 4 (D + 1)."""
    draw, dimensions = np.random.default_rng(0), features.shape[1]
    most = min(len(features), len(reference)) // 2
    sizes = np.linspace(max(most // 4, dimensions + 1), most, SUBSET_SIZES).astype(int)

    def measured(size: int) -> float:
        own = draw.permutation(len(features))
        theirs = own if len(features) == len(reference) else draw.permutation(len(reference))
        other = reference[theirs[-size:]]
        return frechet_distance(features[own[:size]], other.mean(0), np.cov(other, rowvar=False))

    distances = [np.mean([measured(size) for _ in range(SUBSETS)]) for size in sizes]
    return float(np.polyfit(1.0 / sizes, distances, 1)[1])


def kernel_distance(features: np.ndarray, reference: np.ndarray, *, paired: bool = False) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018; "KID" where the features are Inception's).

    paired: row i of both is of one prompt. Such pairs are no independent draws and are left out (Gretton et al. 2012, eq. 4)."""
    if paired:
        return float(kernel_terms(features, reference).mean())
    cross = ((features @ reference.T / features.shape[1] + 1) ** 3).mean()
    return float(_with_others(features, features).mean() + _with_others(reference, reference).mean() - 2 * cross)


def kernel_terms(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(N,) what each prompt adds to the paired `kernel_distance`, which is their mean. Its error is twice that of this mean, since
    each prompt is in half of every term (Hoeffding 1948, theorem 7.1)."""
    within = _with_others(features, features) + _with_others(reference, reference)
    return within - _with_others(features, reference) - _with_others(reference, features)


def _with_others(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean kernel of each row of x with all rows of y but that of the same number."""
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return (kernel.sum(1) - np.diagonal(kernel)) / (len(y) - 1)


def precision_and_recall(
    features: np.ndarray, reference: np.ndarray, neighbours: int = 3, *, paired: bool = False
) -> tuple[float, float]:
    """Share of `features` inside the reference's manifold, and the reverse (Kynkaanniemi et al. 2019, eq. 1-3): a point is
    inside where some point of the set is nearer to it than that point's own k-th neighbour. paired: row i of both is of one
    prompt, and is not looked for near the other."""
    ours, real = torch.from_numpy(features).float(), torch.from_numpy(reference).float()
    cross = torch.cdist(ours, real)
    if paired:
        cross.fill_diagonal_(torch.inf)

    def radii(points: torch.Tensor) -> torch.Tensor:
        return torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values

    inside = (cross <= radii(real)[None]).any(1).float().mean()
    covered = (cross <= radii(ours)[:, None]).any(0).float().mean()
    return float(inside), float(covered)


def spread(features: np.ndarray) -> float:
    """Diversity: the mean distance between two pictures of one prompt. features (prompts, seeds, D)."""
    seeds = features.shape[1]
    distances = np.linalg.norm(features[:, :, None] - features[:, None, :], axis=-1)
    return float(distances.sum() / (len(features) * seeds * (seeds - 1)))


def sharpness(images: np.ndarray) -> np.ndarray:
    """Variance of the Laplacian of each picture's grey values (N,), images (N, H, W, 3) uint8."""
    grey = images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    return laplacian.var(axis=(1, 2))
