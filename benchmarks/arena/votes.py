"""Votes as JSON lines, and what they say together."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import ImagineFlashError
from ..picture_folders import json_lines
from .pairs import Pair

Choice = Literal["A", "B", "tie"]
CHOICES: tuple[Choice, ...] = ("A", "tie", "B")
RESAMPLES = 2000


class Vote(BaseModel):
    """One person's choice between the two pictures of one caption. left: which of them stood on the left; pictures: a Pair's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    caption: str
    choice: Choice
    left: Literal["A", "B"]
    annotator: Annotated[str, Field(pattern=r"^[\w.-]{1,40}$")]
    seconds: Annotated[float, Field(ge=0)]
    pictures: str = ""  # not known


class Summary(BaseModel):
    """preference: the share of votes for A, ties counted half, with its 95 % interval over picture pairs, two of them made up.

    left: the same share for whatever stood on the left: far from a half, people did not look. agreement, kappa: of people who
    judged the same pair, how often they said the same, and how much more often than by chance (Fleiss); None where nobody did.
    """

    votes: int
    annotators: int
    wins: int
    ties: int
    losses: int
    preference: float
    interval: tuple[float, float]
    left: float
    agreement: float | None
    kappa: float | None


def read_votes(path: Path) -> list[Vote]:
    """The votes in a file, of each person on each pair the last one; none without a file. ImagineFlashError names a bad line."""
    found: dict[tuple[str, str], Vote] = {}
    for number, line in json_lines(path) if path.exists() else ():
        try:
            vote = Vote.model_validate_json(line)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ImagineFlashError(f"{path}, line {number} is no vote ({reason}); mend or remove it") from None
        found[vote.annotator, vote.key] = vote
    return list(found.values())


def check_votes(votes: Sequence[Vote], pairs: Sequence[Pair], path: Path) -> None:
    """ImagineFlashError where a file holds votes on other pictures than these."""
    known = {pair.key: pair.pictures for pair in pairs}
    for vote in votes:
        if known.get(vote.key) != vote.pictures:
            raise ImagineFlashError(
                f"{path} holds votes on other pictures ({vote.key!r}, {vote.caption[:60]!r}); --votes names a new file"
            )


def add_vote(path: Path, vote: Vote) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(vote.model_dump(), ensure_ascii=False) + "\n")


def summary(votes: Sequence[Vote]) -> Summary:
    """What `votes` say. ImagineFlashError where there are none."""
    if not votes:
        raise ImagineFlashError("there are no votes yet")
    counts = Counter(vote.choice for vote in votes)
    left = Counter("tie" if vote.choice == "tie" else "left" if vote.choice == vote.left else "right" for vote in votes)
    agreement, kappa = _agreement(votes)
    return Summary(
        votes=len(votes),
        annotators=len({vote.annotator for vote in votes}),
        wins=counts["A"],
        ties=counts["tie"],
        losses=counts["B"],
        preference=_share(counts["A"], counts["tie"], len(votes)),
        interval=_interval(votes),
        left=_share(left["left"], left["tie"], len(votes)),
        agreement=agreement,
        kappa=kappa,
    )


def _share(wins: int, ties: int, total: int) -> float:
    return round((wins + ties / 2) / total, 4)


def _interval(votes: Sequence[Vote]) -> tuple[float, float]:
    """Bootstrap over pairs: the votes on one pair of pictures are not independent. With one more pair for each side, since few
    or unanimous votes would have an interval without width."""
    worth = {"A": 1.0, "tie": 0.5, "B": 0.0}
    by_pair: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        by_pair[vote.key].append(worth[vote.choice])
    sums = np.array([[sum(each), len(each)] for each in (*by_pair.values(), [worth["A"]], [worth["B"]])])
    rows = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    drawn = sums[rows].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    return round(float(low), 4), round(float(high), 4)


def _agreement(votes: Sequence[Vote]) -> tuple[float | None, float | None]:
    """Fleiss 1971, for pairs with any number of votes above one."""
    by_pair: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        by_pair[vote.key][vote.choice] += 1
    table = np.array([[counts[choice] for choice in CHOICES] for counts in by_pair.values()], dtype=float)
    table = table[table.sum(1) > 1]
    if not len(table):
        return None, None
    n = table.sum(1)
    observed = float((((table**2).sum(1) - n) / (n * (n - 1))).mean())
    chance = float(((table.sum(0) / table.sum()) ** 2).sum())
    kappa = None if chance == 1 else round((observed - chance) / (1 - chance), 4)
    return round(observed, 4), kappa
