"""Distances between sets of pictures by their closed forms."""

import numpy as np
import pytest

from imagine_flash.benchmarks.quality.metrics import (
    frechet_distance,
    kernel_distance,
    precision_and_recall,
    sharpness,
    spread,
    unbiased_frechet_distance,
    unbiased_sample_distance,
)


def test_frechet_distance_of_gaussians() -> None:
    """Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2, exactly."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((4000, 6))
    raw = (raw - raw.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    scale, shift = np.array([1, 2, 3, 0.5, 1, 1.0]), np.array([0, 1, 0, 0, -2, 0.0])
    got = frechet_distance(raw * scale + shift, np.zeros(6), np.eye(6))
    assert got == pytest.approx((shift**2).sum() + ((scale - 1) ** 2).sum(), abs=1e-9)
    assert frechet_distance(raw, np.zeros(6), np.eye(6)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_the_covariances_do_not_commute_with_the_identity_alone() -> None:
    """C1 = M C2 M with M symmetric positive: the distance is |m1 - m2|^2 + tr((M - I) C2 (M - I)) (optimal map M)."""
    rng = np.random.default_rng(1)
    raw = rng.standard_normal((4000, 4))
    raw = (raw - raw.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T  # exactly white
    a, b = rng.standard_normal((2, 4, 4))
    second, m = a @ a.T + np.eye(4), b @ b.T + 0.5 * np.eye(4)
    first = m @ second @ m
    features = raw @ np.linalg.cholesky(first).T + np.array([1.0, 0, 0, 2])
    expected = 5 + np.trace((m - np.eye(4)) @ second @ (m - np.eye(4)))
    assert frechet_distance(features, np.zeros(4), second) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_few_samples_is_biased_and_the_extrapolation_is_not() -> None:
    """Gaussians at known distances, 64 dimensions: the samples' own distance grows with their number's inverse."""
    rng = np.random.default_rng(2)
    for shift in (0.0, 2.0):
        samples = rng.standard_normal((1024, 64)) + shift / 8  # |shift / 8| in each of 64 dimensions: shift^2 in all
        biased = frechet_distance(samples, np.zeros(64), np.eye(64))
        unbiased = unbiased_frechet_distance(samples, np.zeros(64), np.eye(64))
        assert biased > shift**2 + 1 and unbiased == pytest.approx(shift**2, abs=0.35)


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_two_sets_of_samples_at_a_known_distance(shared: float) -> None:
    """Also where row i of both is of one prompt; without the extrapolation equal distributions are 1 apart, or less than 0."""
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        common, a, b = rng.standard_normal((3, 400, 16))
        mixed = [shared**0.5 * common + (1 - shared) ** 0.5 * own for own in (a, b)]
        found.append([unbiased_sample_distance(mixed[0] + shift, mixed[1]) for shift in (0.0, 0.5)])
    equal, apart = np.mean(found, 0)
    assert abs(equal) < 0.1 and apart == pytest.approx(0.25 * 16, rel=0.1)


def test_kernel_distance_is_unbiased() -> None:
    """Two samples of one distribution: zero on average over draws, and the biased estimate is not."""
    found = []
    for seed in range(40):
        a, b = np.random.default_rng(seed).standard_normal((2, 60, 8))
        found.append(kernel_distance(a, b))
    assert abs(np.mean(found)) < 3 * np.std(found) / 40**0.5
    rng = np.random.default_rng(1)
    assert kernel_distance(rng.standard_normal((60, 8)) + 2, rng.standard_normal((60, 8))) > 10 * np.std(found)


def test_pictures_of_one_prompt_are_no_independent_draws() -> None:
    """Row i of both has something in common: with these pairs the distance of equal distributions is below 0, without them 0."""
    naive, paired = [], []
    for seed in range(40):
        common, a, b = np.random.default_rng(seed).standard_normal((3, 60, 8))
        naive.append(kernel_distance(common + a, common + b))
        paired.append(kernel_distance(common + a, common + b, paired=True))
    error = np.std(paired) / 40**0.5
    assert abs(np.mean(paired)) < 3 * error and np.mean(naive) < -3 * error
    points = np.random.default_rng(0).standard_normal((60, 8))
    assert precision_and_recall(points, points) == (1, 1)
    share, again = precision_and_recall(points, points, paired=True)
    assert share == again < 1


def test_kernel_distance_of_points() -> None:
    """Two points each in one dimension: k(x, y) = (x y + 1)^3 by hand."""
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    expected = 1.0 + 7.0**3 - 2 * (1 + 1 + 27 + 64) / 4
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_precision_and_recall_of_clusters() -> None:
    """Pictures of one of two clusters: all are real ones, half of the real ones are covered; noise far away: none."""
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.standard_normal((200, 4)) * 0.1, rng.standard_normal((200, 4)) * 0.1 + 50])
    ours = rng.standard_normal((300, 4)) * 0.1
    precision, recall = precision_and_recall(ours, real)
    assert precision > 0.8 and 0.4 < recall <= 0.5
    assert precision_and_recall(real + 1000, real) == (0.0, 0.0)


def test_spread_is_the_mean_distance_within_a_prompt() -> None:
    features = np.array([[[0.0, 0], [3, 4]], [[1, 1], [1, 2]]])
    assert spread(features) == pytest.approx((5 + 1) / 2)


def test_sharpness_of_a_checkerboard() -> None:
    """Grey values 0 and 255 in turn: the Laplacian is +-4 * 255 everywhere inside."""
    rows, columns = np.mgrid[0:8, 0:8]
    board = np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, -1)
    assert sharpness(np.stack([board, np.zeros_like(board)])) == pytest.approx([(4 * 255) ** 2, 0])
