"""The record of an evaluation as a table, for the docs and for a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from ..records import markdown_table
from .method import REFERENCE
from .published import published_as_markdown

ATTRIBUTES = ("all", "object", "relation", "background", "pattern")
HEADINGS = ("method", "calls", *ATTRIBUTES, "held out", "FD (judge)", "x teacher")


def table_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """The record as rows of text, shares in per cent, FD with the half-width of its 95 % interval."""
    rows, best = [], next((r["fd_judge_unbiased"] for r in record["rows"] if r["method"] == REFERENCE), None)
    for row in record["rows"]:
        low, high = row.get("fd_interval", (None, None))  # which the first records have not
        seen = (f"{100 * row['seen'][name]:.1f}" if name in row["seen"] else "–" for name in ATTRIBUTES)
        distance = f"{row['fd_judge_unbiased']:.1f}" + (f" ± {(high - low) / 2:.1f}" if low is not None else "")
        ratio = (
            f"{row['fd_judge_unbiased'] / best:.2f}"
            if best and row["network_calls"] and row["method"] != REFERENCE
            else "–"
        )
        rows.append(
            (row["method"], str(row["network_calls"]), *seen, f"{100 * row['held_out']['all']:.1f}", distance, ratio)
        )
    return rows


def as_markdown(record: dict[str, Any]) -> str:
    """The table that the README shows; a test holds the two equal."""
    return markdown_table(HEADINGS, table_rows(record), ["method"])


MORE = (
    ("kd_judge", "KD (judge)"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("diversity", "diversity"),
    ("sharpness", "sharpness"),
    ("detail_deviation", "detail"),
    ("error_to_teacher", "error to teacher"),
)


def more_as_markdown(record: dict[str, Any]) -> str:
    """The further measures of each row, with the paired intervals of what is compared with the teacher at 25 steps."""
    headings = ["method", *(heading for _, heading in MORE), "FD ratio, 95 %", "fidelity, points, 95 %"]
    rows = []
    for row in record["rows"]:
        cells = [f"{row[name]:.4g}" if name in row else "–" for name, _ in MORE]
        ratio, gain = row.get("fd_ratio"), row.get("fidelity_difference")
        cells.append(f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else "–")
        cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in gain)) if gain else "–")
        rows.append([row["method"], *cells])
    return markdown_table(headings, rows, ["method"])


def pairs_as_markdown(record: dict[str, Any]) -> str:
    """The first variant of a study against each other one; below 0, its FD (judge) is the smaller. KD in thousands."""
    rows, headings = [], ["method", "against", "FD, 95 %", "fidelity, points, 95 %"]
    if has_kd := all("kd_difference" in pair for pair in record["pairs"]):  # which the first records have not
        headings.append("KD / 1000, 95 %")
    for pair in record["pairs"]:
        found = [pair["fd_difference"], [100 * v for v in pair["fidelity_difference"]]]
        found += [[v / 1000 for v in pair["kd_difference"]]] if has_kd else []
        cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*values) for values in found]
        rows.append((pair["method"], pair["than"], *cells))
    return markdown_table(headings, rows, ["method", "against"])


def read_quality(file: Path) -> dict[str, Any] | None:
    """The record of a study or an evaluation; None for a file that holds none."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    rows = record.get("rows") if isinstance(record, dict) else None
    return record if isinstance(rows, list) and rows and "fd_judge_unbiased" in rows[0] else None


def quality_as_markdown(record: dict[str, Any]) -> str:
    """Of a study the question and what each variant changes; the table, the further measures, and the paper's figures beside."""
    tables = [as_markdown(record), "", more_as_markdown(record)]
    if record.get("pairs"):
        tables += ["", pairs_as_markdown(record)]
    if beside := published_as_markdown(record):
        tables += ["", beside]
    if "variants" not in record:
        return "\n".join(tables)
    lines = [record["question"], ""]
    for name, variant in record["variants"].items():
        fields = yaml.safe_dump(variant["fields"], default_flow_style=True, width=10_000).strip() or "{}"
        training = variant["training"]
        time = f"{training.get('steps', 0):.0f} updates, {training.get('seconds', 0) / 60:.0f} minutes"
        lines.append(f"- **{name}**: `{fields}`; {time}")
    return "\n".join([*lines, "", *tables])


def as_rich(record: dict[str, Any]) -> Table:
    """The same table for a terminal."""
    counts = f"{record['n']['seen']} seen, {record['n']['held_out']} held out, {record['split']} prompts"
    table = Table(title=f"prompt fidelity in %, {counts}")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in table_rows(record):
        table.add_row(*row)
    return table
