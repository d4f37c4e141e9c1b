"""Differences of two rows that drew the same prompts from the same noises."""

import numpy as np
import pytest

from imagine_flash.benchmarks.quality import paired
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


@pytest.mark.slow
def test_the_interval_of_a_difference_in_kernel_distance_holds_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rows at equal distances on average, of prompts that both and the real scenes share: 0 is inside in 95 % of them.

    Where rows are as near as they can be, intervals are wider than need be, by the square root of 2."""
    monkeypatch.setattr(paired, "RESAMPLES", 2)  # of what this does not ask for
    inside, tell_apart = 0, 0
    right = np.ones(100, np.int8)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        common, real, a, b = rng.standard_normal((4, 100, 4))
        rows = [common + 0.5 * own + 0.7 for own in (a, b, b + 1)]
        distances = [distance_of(features, REFERENCE, common + 0.5 * real) for features in rows]
        one, other, far = (row(features, right) for features in rows)
        _, low, high = between(one, other, distances[0], distances[1])["kd_difference"]
        inside += low <= 0 <= high
        tell_apart += between(far, other, distances[2], distances[1])["kd_difference"][1] > 0
    assert 90 <= inside <= 99 and tell_apart > 90


def test_a_row_beside_itself() -> None:
    features = np.random.default_rng(1).standard_normal(SIZE)
    same, distance = row(features, np.ones(SIZE[0], np.int8)), distance_of(features, REFERENCE, features[::-1])
    nothing = {key: [0, 0, 0] for key in ("fd_difference", "fidelity_difference", "kd_difference")}
    assert between(same, same, distance, distance) == nothing
    told = against_teacher(same, same, distance, distance)
    assert told == {"fd_ratio": [1, 1, 1], "fidelity_difference": [0, 0, 0], "error_to_teacher": 0}
