"""Differences of two rows that drew the same prompts from the same noises."""

import numpy as np
import pytest

from imagine_flash.benchmarks.quality.measure import Measured
from imagine_flash.benchmarks.quality.paired import against_teacher, between, distance_of

SIZE, REFERENCE = (400, 4), (np.zeros(4), np.eye(4))


def row(features: np.ndarray, right: np.ndarray) -> Measured:
    latents = features[:, :1, None, None].astype(np.float16)
    return Measured(features=features, marks=right[:, None], sharpness=features[:, 0], latents=latents, seconds=1.0)


def test_what_two_rows_share_does_not_widen_their_difference() -> None:
    """One row lies 0.5 farther off in each of 4 dimensions than its twin: 4 (1 - 0.25) = 3 in FD, by the closed form."""
    rng = np.random.default_rng(0)
    twin = rng.standard_normal(SIZE) + 0.5
    far = twin + 0.5
    right, wrong = np.ones(SIZE[0], np.int8), (rng.random(SIZE[0]) < 0.75).astype(np.int8)
    one, other = row(far, wrong), row(twin, right)
    own, theirs = distance_of(far, REFERENCE), distance_of(twin, REFERENCE)
    found = between(one, other, own, theirs)
    value, low, high = found["fd_difference"]
    assert low < value < high and value == pytest.approx(3, abs=0.4)
    (a, b), (c, d) = own.interval, theirs.interval
    assert high - low < 0.6 * np.hypot(b - a, d - c)
    value, low, high = found["fidelity_difference"]
    assert low < value < high < 0 and value == pytest.approx(-0.25, abs=0.06)
    assert between(other, one, theirs, own)["fd_difference"][0] == -found["fd_difference"][0]


def test_a_row_beside_itself() -> None:
    features = np.random.default_rng(1).standard_normal(SIZE)
    same, distance = row(features, np.ones(SIZE[0], np.int8)), distance_of(features, REFERENCE)
    assert between(same, same, distance, distance) == {"fd_difference": [0, 0, 0], "fidelity_difference": [0, 0, 0]}
    told = against_teacher(same, same, distance, distance)
    assert told == {"fd_ratio": [1, 1, 1], "fidelity_difference": [0, 0, 0], "error_to_teacher": 0}
