"""The paper's own figures beside a study's: which orderings of methods agree, and which do not.

Absolute values cannot be compared: another teacher, other pictures, other features. Orderings can.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..records import markdown_table
from .method import REFERENCE

NEAR = {"distance": 0.03, "fidelity": 0.01}  # of the paper's FID and CLIP: it gives no errors, and less is no ordering
HEADINGS = ("method", "FID, paper", "x teacher", "FD (judge), here", "x teacher", "CLIP, paper", "fidelity, here")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """One row in both. distance: FID there, FD (judge) here with its 95 % interval; prompt: CLIP there, per cent here."""

    method: str
    fid: float
    clip: float
    distance: float
    distance_interval: tuple[float, float]
    fidelity: float
    fidelity_interval: tuple[float, float]


def published() -> dict[str, dict[str, dict[str, float]]]:
    """Study -> row -> {"fid", "clip"} of published.yaml."""
    import yaml

    return yaml.safe_load(
        files("imagine_flash.benchmarks.quality").joinpath("published.yaml").read_text(encoding="utf-8")
    )


def rows_in_both(record: dict[str, Any]) -> list[Beside]:
    """The record's rows that the paper has too, of the study with which it shares the most."""
    ours = {row["method"]: row for row in record["rows"] if "fd_interval" in row}
    theirs = max(published().values(), key=lambda study: len(study.keys() & ours))
    found = []
    for name, figures in theirs.items():
        if name in ours:
            row, share = ours[name], ours[name]["seen"]["all"]
            low, high = row["fd_interval"]
            half = 1.96 * math.sqrt(share * (1 - share) / record["n"]["seen"])
            found.append(
                Beside(
                    method=name,
                    fid=figures["fid"],
                    clip=figures["clip"],
                    distance=row["fd_judge_unbiased"],
                    distance_interval=(low, high),
                    fidelity=100 * share,
                    fidelity_interval=(100 * (share - half), 100 * (share + half)),
                )
            )
    return found


def orderings(rows: list[Beside], measure: str) -> dict[str, list[tuple[Beside, Beside]]]:
    """Pairs (better in the paper, worse), by what is found here: "agree", "disagree", or "undecided" where the intervals here
    overlap. measure: "distance" (FID against FD) or "fidelity" (CLIP against fidelity). Rows that are nearer to each other than
    NEAR in the paper are no pairs."""
    found: dict[str, list[tuple[Beside, Beside]]] = {"agree": [], "disagree": [], "undecided": []}
    for pair in itertools.combinations(rows, 2):
        theirs = [one.fid if measure == "distance" else -one.clip for one in pair]
        if abs(theirs[0] - theirs[1]) <= NEAR[measure] * abs(theirs[0]):
            continue
        better, worse = pair if theirs[0] < theirs[1] else pair[::-1]
        low, high = (getattr(one, f"{measure}_interval") for one in (better, worse))
        if measure == "fidelity":
            low, high = high, low  # more is better
        verdict = "agree" if low[1] < high[0] else "disagree" if high[1] < low[0] else "undecided"
        found[verdict].append((better, worse))
    return found


def published_as_markdown(record: dict[str, Any]) -> str:
    """The rows in both, the counts of orderings, and each pair that is the other way round here; "" for fewer than two rows
    of students."""
    rows = rows_in_both(record)
    if sum(not row.method.startswith("teacher") for row in rows) < 2:
        return ""
    base = next((row for row in rows if row.method == REFERENCE), None)

    def over(value: float, of_base: float | None) -> str:
        return "–" if of_base is None else f"{value / of_base:.2f}"

    cells = [
        (
            row.method,
            f"{row.fid:g}",
            over(row.fid, base and base.fid),
            f"{row.distance:.1f}",
            over(row.distance, base and base.distance),
            f"{row.clip:g}",
            f"{row.fidelity:.1f}",
        )
        for row in rows
    ]
    lines = [markdown_table(HEADINGS, cells, ["method"])]
    for measure, names in (("distance", "FID there, FD here"), ("fidelity", "CLIP there, fidelity here")):
        found = orderings(rows, measure)
        counts = ", ".join(f"{len(pairs)} {verdict}" for verdict, pairs in found.items())
        rule = f"rows at least {100 * NEAR[measure]:.0f} % apart there; undecided: intervals of 95 % overlap here"
        lines += ["", f"Orderings by {names}: {counts} ({rule})."]
        lines += [f"- The other way round here: {b.method} before {w.method} there" for b, w in found["disagree"]]
    return "\n".join(lines)
