"""When somebody for whom there was no room shall ask again."""

from __future__ import annotations

import time
from collections import deque

from .work import GenerateResult

RECENTLY = 10.0  # seconds, in which the pace of drawing is measured
COMING = 4  # times as many as wait: the most of those refused that are believed to come back


class WaitingLine:
    """When whoever was refused shall come back: one after the other, as fast as pictures are drawn."""

    def __init__(self) -> None:
        self._drawn: deque[tuple[float, int]] = deque(maxlen=256)  # when, how many
        self._end = 0.0  # of the line, by the monotonic clock

    def drawn(self, result: GenerateResult) -> None:
        self._drawn.append((time.monotonic(), len(result.images)))

    def join(self, waiting: int, pictures: int) -> float:
        """1 to 60 seconds: clients of OpenAI's API believe no more. A client that is refused again and again makes the line no
        longer than `COMING` has it, so others are not sent away for minutes."""
        now = time.monotonic()
        recent = [(when, count) for when, count in self._drawn if when > now - RECENTLY]
        drawn = sum(count for _, count in recent[1:])
        pace = (recent[-1][0] - recent[0][0]) / drawn if drawn else 0.0  # seconds per picture
        end = max(self._end, now + waiting * pace) + pictures * pace
        self._end = min(end, now + (1 + COMING) * max(waiting, pictures) * pace)
        return min(max(self._end - now, 1.0), 60.0)
