"""The page on which people vote: pairs in random order, sides at random, and no word of which model drew what."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from ...core.errors import missing_extra
from .pairs import Pair
from .votes import Choice, Vote, add_vote, check_votes, read_votes, summary

try:
    from fastapi import FastAPI, HTTPException, Query, Response
    from fastapi.staticfiles import StaticFiles
except ImportError as missing:
    raise missing_extra(missing.name or "fastapi", "serve") from None
from pydantic import BaseModel, ConfigDict, Field

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'",
    "x-content-type-options": "nosniff",
}
NAME = r"^[\w.-]{1,40}$"
Annotator = Annotated[str, Query(pattern=NAME)]


class Ballot(BaseModel):
    """What the page sends: the place of the pair, and which side. shown: what `/next` said, since another start has other sides."""

    model_config = ConfigDict(extra="forbid")

    annotator: Annotated[str, Field(pattern=NAME)]
    shown: Annotated[str, Field(max_length=64)]
    pair: Annotated[int, Field(ge=0)]
    side: Literal["left", "right", "tie"]
    seconds: Annotated[float, Field(ge=0, le=86400)]


class _Chance:
    """What one person is shown: the same each time, and not to be guessed."""

    def __init__(self) -> None:
        self.secret, self.start = secrets.token_bytes(16), secrets.token_hex(8)

    def of(self, annotator: str, what: object) -> random.Random:
        return random.Random(hashlib.sha256(self.secret + f"{annotator}\n{what}".encode()).digest())

    def left(self, annotator: str, pair: int) -> Literal["A", "B"]:
        return self.of(annotator, pair).choice(("A", "B"))


def create_app(pairs: Sequence[Pair], file: Path) -> FastAPI:
    """Routes: / (the page), /next, /picture/{pair}/{side}, /vote, /results. Votes go to `file`, which is read again at a start.
    Raises ImagineFlashError where it holds votes on other pictures."""
    check_votes(read_votes(file), pairs, file)
    app, chance = FastAPI(title="Which do you like better?", docs_url=None, redoc_url=None), _Chance()

    def known(pair: int) -> Pair:
        if pair >= len(pairs):
            raise HTTPException(404, f"there are {len(pairs)} pairs, no pair {pair}")
        return pairs[pair]

    @app.get("/next")
    def following(annotator: Annotator) -> dict[str, Any]:
        """A pair that this person has not judged; null where none is left."""
        judged = {vote.key for vote in read_votes(file) if vote.annotator == annotator}
        order = list(range(len(pairs)))
        chance.of(annotator, "order").shuffle(order)
        left = [place for place in order if pairs[place].key not in judged]
        found = {"pair": left[0], "caption": pairs[left[0]].caption} if left else {"pair": None, "caption": ""}
        return found | {"judged": len(pairs) - len(left), "total": len(pairs), "shown": chance.start}

    @app.get("/picture/{pair}/{side}")
    def picture(pair: int, side: Literal["left", "right"], annotator: Annotator) -> Response:
        one = known(pair)
        is_a = (chance.left(annotator, pair) == "A") == (side == "left")
        return Response(one.a if is_a else one.b, media_type="image/*", headers=HEADERS)

    @app.post("/vote", status_code=204)
    def vote(ballot: Ballot) -> None:
        if ballot.shown != chance.start:
            raise HTTPException(409, "the server was started again since these were shown; look again")
        one, left = known(ballot.pair), chance.left(ballot.annotator, ballot.pair)
        right: Choice = "B" if left == "A" else "A"
        choices: dict[str, Choice] = {"left": left, "right": right, "tie": "tie"}
        said = {"annotator": ballot.annotator, "seconds": round(ballot.seconds, 2), "pictures": one.pictures}
        add_vote(file, Vote(key=one.key, caption=one.caption, choice=choices[ballot.side], left=left, **said))

    @app.get("/results")
    def results() -> dict[str, Any]:
        votes = read_votes(file)
        return summary(votes).model_dump() if votes else {"votes": 0}

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app
