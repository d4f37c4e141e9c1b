"""When those who were refused are told to come back."""

import types

import numpy as np
import pytest

from imagine_flash.engine import waiting
from imagine_flash.engine.waiting import WaitingLine
from imagine_flash.engine.work import GenerateResult, Timings

PICTURE = GenerateResult(images=np.zeros((1, 8, 8, 3), np.uint8), timings=Timings(), steps=1, seed=0, unknown_words=[])


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> WaitingLine:
    """A picture takes 0.1 seconds; time stands still."""
    now, line = [0.0], WaitingLine()
    monkeypatch.setattr(waiting, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for _ in range(50):
        now[0] += 0.1
        line.drawn(PICTURE)
    return line


def test_those_who_are_refused_come_one_after_another(line: WaitingLine) -> None:
    told = [line.join(32, 1) for _ in range(100)]
    assert told == pytest.approx([3.2 + 0.1 * (i + 1) for i in range(100)])


def test_somebody_who_asks_again_and_again_sends_nobody_away_for_long(line: WaitingLine) -> None:
    """After 20 seconds of one client that did not heed what it was told, everybody was told 60 seconds, 2 being true."""
    for _ in range(10_000):
        line.join(16, 1)
    assert line.join(16, 1) == pytest.approx(16 * 0.1 * 5)
    assert line.join(0, 8) == pytest.approx(8 * 0.1 * 5), "what waited is drawn"
