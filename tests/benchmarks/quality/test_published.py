"""The paper's figures beside ours, and quality against time."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from imagine_flash.benchmarks.quality import study as studies
from imagine_flash.benchmarks.quality.plots import points, times_of
from imagine_flash.benchmarks.quality.published import orderings, published, published_as_markdown, rows_in_both
from imagine_flash.benchmarks.quality.study import load_study
from imagine_flash.benchmarks.schema import read_record
from imagine_flash.cli import app

ROOT = Path(studies.__file__).parents[2]
LATENCY = ROOT / "docs/results/latency_teacher.json"


def row(method: str, calls: int, distance: float, share: float) -> dict[str, Any]:
    return {
        "method": method,
        "network_calls": calls,
        "fd_judge_unbiased": distance,
        "fd_interval": [distance - 10, distance + 10],
        "seen": {"all": share},
        "held_out": {"all": share},
    }


RECORD = {
    "question": "Which?",
    "n": {"seen": 10_000, "held_out": 1},
    "rows": [
        row("teacher, 25 steps", 50, 300, 0.90),
        row("LCM: student, 3 steps", 3, 400, 0.85),  # nearer than Imagine Flash here, further away in the paper
        row("Imagine Flash: student, 3 steps", 3, 450, 0.89),
        row("ADD: student, 4 steps", 4, 455, 0.70),  # within the interval of Imagine Flash
        row("DMD2: student, 1 step", 1, 100, 0.80),  # the paper has none
    ],
}


@pytest.mark.parametrize("name", ["comparison of methods", "ablation"])
def test_the_paper_s_rows_are_rows_of_the_studies(name: str) -> None:
    files = {"comparison of methods": ["methods.yaml"], "ablation": ["ablation.yaml", "ablation_losses.yaml"]}[name]
    loaded = [load_study(ROOT / "benchmarks/studies" / file) for file in files]
    study = loaded[0][0]
    plans = {variant: set(recipe.plans) for _, recipes in loaded for variant, recipe in recipes.items()}
    for method, figures in published()[name].items():
        assert figures.keys() == {"fid", "clip"}
        variant, _, steps = method.rpartition(": ")
        number = int(steps.split()[1])
        if method.startswith("teacher"):
            assert int(method.split()[1]) in {25, *study.teacher_steps}
        else:
            assert number in plans[variant], method


def test_which_orderings_agree() -> None:
    rows = rows_in_both(RECORD)
    assert [one.method for one in rows] == [
        "teacher, 25 steps",
        "ADD: student, 4 steps",
        "LCM: student, 3 steps",
        "Imagine Flash: student, 3 steps",
    ]
    found = orderings(rows, "distance")
    names = {key: {(a.method.split(":")[0], b.method.split(":")[0]) for a, b in pairs} for key, pairs in found.items()}
    assert names["disagree"] == {("Imagine Flash", "LCM"), ("ADD", "LCM")}  # the teacher is within 1 % there
    assert names["undecided"] == {("Imagine Flash", "ADD")}
    assert len(found["agree"]) == 2
    fidelity = orderings(rows, "fidelity")
    assert [(a.method, b.method) for a, b in fidelity["undecided"]] == [
        ("teacher, 25 steps", "Imagine Flash: student, 3 steps")
    ]
    assert [(a.method, b.method) for a, b in fidelity["disagree"]] == [
        ("ADD: student, 4 steps", "LCM: student, 3 steps")
    ]
    assert len(fidelity["agree"]) == 4


def test_the_page_names_what_is_the_other_way_round() -> None:
    text = published_as_markdown(RECORD)
    assert "| LCM: student, 3 steps | 59.1 | 1.66 | 400.0 | 1.33 | 28.94 | 85.0 |" in text
    assert "2 agree, 2 disagree, 1 undecided" in text
    assert "- The other way round here: Imagine Flash: student, 3 steps before LCM: student, 3 steps there" in text
    few = {**RECORD, "rows": RECORD["rows"][:2]}
    assert published_as_markdown(few) == ""


def test_quality_against_time() -> None:
    times = times_of(read_record(LATENCY))
    assert set(times.teacher) == {25, 50} and set(times.student) == set(times.engine) == {1, 2, 3}
    assert times.engine[1] < times.student[1] < times.teacher[25] < times.teacher[50]
    lines = points(RECORD, times)
    assert lines == {
        "teacher, DDIM, in diffusers": [(25, times.teacher[25], 300)],
        "DMD2, in diffusers": [(1, times.student[1], 100)],
        "DMD2": [(1, times.engine[1], 100)],
        "LCM, in diffusers": [(3, times.student[3], 400)],
        "LCM": [(3, times.engine[3], 400)],
        "Imagine Flash, in diffusers": [(3, times.student[3], 450)],
        "Imagine Flash": [(3, times.engine[3], 450)],
    }


def test_the_report_of_a_study_with_its_plot(tmp_path: Path) -> None:
    quality, page = tmp_path / "quality.json", tmp_path / "page.md"
    quality.write_text((ROOT / "docs/results/emoji_scenes.json").read_text(encoding="utf-8"), encoding="utf-8")
    page.write_text(empty := "<!-- bench:quality --><!-- /bench -->\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["bench", "report", str(quality), str(page), "--with", str(LATENCY)])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "quality_time.png") as picture:
        assert picture.width > 800
    page.write_text(empty, encoding="utf-8")
    done = CliRunner().invoke(
        app, ["bench", "report", str(quality), str(page), "--with", str(ROOT / "docs/results/serve.json")]
    )
    assert "measure with bench latency --against diffusers --teacher" in str(done.exception)
    assert page.read_text(encoding="utf-8") == empty  # nothing is half-written
