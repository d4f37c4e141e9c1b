"""The docs say what is: tables come from records, every option is described."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GROUPS = {"bench", "cache"}  # of commands
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_is_said_of_the_model_is_the_record() -> None:
    from imagine_flash.benchmarks.quality.tables import as_markdown

    record = json.loads((ROOT / "docs/results/emoji_scenes.json").read_text(encoding="utf-8"))
    card = (ROOT / "docs/model-card.md").read_text(encoding="utf-8")
    assert as_markdown(record) in card
    rows = {row["method"]: row["seen"]["all"] for row in record["rows"]}
    said = re.search(r"is right in ([\d.]+) % of the student's pictures, in ([\d.]+) % of the teacher's", README)
    assert said and [float(share) for share in said.groups()] == [
        round(100 * rows[name], 1) for name in ("student, 3 steps", "teacher, 25 steps")
    ]


def test_the_card_names_every_word_that_the_model_knows() -> None:
    from imagine_flash.folders.reading import read_artifact_manifest

    card = (ROOT / "docs/model-card.md").read_text(encoding="utf-8")
    listed = card.split("```text\n")[1].split("```")[0].split()
    (spec,) = read_artifact_manifest(ROOT / "assets/emoji/artifact", verify=False).tokenizers
    assert sorted(listed) == sorted(spec.known_words)


def test_the_full_size_table_is_of_the_records() -> None:
    table = (ROOT / "docs/export.md").read_text(encoding="utf-8").split("## Models of full size")[1]
    linked = re.findall(r"\]\((results/export_\w+\.json)\) \| ([\d.]+) G \| (\d+) s \| ([\d.]+) GiB", table)
    assert linked
    for file, parameters, seconds, memory in linked:
        record = json.loads((ROOT / "docs" / file).read_text(encoding="utf-8"))
        figures = f"{record['parameters'] / 1e9:.2f}", f"{record['seconds']:.0f}", f"{record['peak_resident_gib']:.1f}"
        assert (parameters, seconds, memory) == figures


def commands() -> dict[str, Any]:
    """Every command by the words that call it, groups left out."""
    from typer.main import get_command

    from imagine_flash.cli import app

    found = dict(get_command(app).commands)  # type: ignore[attr-defined]
    groups = {group: found.pop(group).commands for group in GROUPS}
    return found | {f"{group} {name}": one for group, own in groups.items() for name, one in own.items()}


def test_the_reference_of_commands_is_what_their_help_says() -> None:
    """docs/cli.md is made by `python -m typer imagine_flash.cli utils docs --name imagine-flash --title "Command line"
    --output docs/cli.md`; compared by what it says, since each Typer lays it out anew."""
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    parts = {part.splitlines()[0].strip("` "): part for part in page.split("## `imagine-flash ")[1:]}
    assert parts.keys() - GROUPS == commands().keys()
    for name, command in commands().items():
        said, options = " ".join(parts[name].split()), {"--help", "-h"}
        assert " ".join(command.help.split("\n\n")[0].split()) in said, name
        for parameter in command.params:
            options |= {o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("-")}
            assert f"{' '.join(parameter.help.split())}" in said, f"{name} {parameter.name}"
        bullets = [line.split(": ")[0] for line in parts[name].splitlines() if line.startswith("* `-")]
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(bullets))) - {"-h"} == options - {"-h"}, name


def test_help_names_the_kind_of_every_value_and_gives_two_examples() -> None:
    for name, command in commands().items():
        assert command.epilog.count("$ imagine-flash") >= 2, name
        for parameter in command.params:
            takes_a_value = not getattr(parameter, "is_flag", False)
            assert not takes_a_value or parameter.metavar, f"{name} {parameter.name}"
            assert parameter.help and parameter.help.rstrip().endswith("."), f"{name} {parameter.name}"


def record_rows(name: str, **case: object) -> dict:
    """The last row of each kind of a record, of those with these values."""
    from imagine_flash.benchmarks.schema import read_record

    rows = read_record(ROOT / f"docs/results/{name}.json").rows
    return {str(row.case["what"]): row for row in rows if case.items() <= row.case.items()}


def latency_row(name: str, baseline: str, **case: object) -> Any:
    """The row of a record where this one is compared."""
    from imagine_flash.benchmarks.schema import read_record

    rows = read_record(ROOT / f"docs/results/{name}.json").rows
    (found,) = (row for row in rows if row.baseline == baseline and case.items() <= row.case.items())
    return found


def test_the_readmes_times_are_those_of_the_records() -> None:
    runtime = record_rows("runtime")
    one_picture = latency_row("latency_embedded", "diffusers fp32", steps=1)
    typing = record_rows("serve", sessions=16)["typing"]
    pairs = [
        (one_picture, "imagine-flash openvino bf16", "diffusers fp32"),
        (runtime["cold start"], "onnxruntime", "diffusers, torch eager"),
        (typing, "latest wins", "every key in turn"),
    ]
    expected = [tuple(f"{row[name].p50_us / 1e3:#.3g}" for name in names) for row, *names in pairs]
    numbers = [tuple(map(float, pair)) for pair in expected]
    found = re.findall(r"\| ([\d.]+) ms \| ([\d.]+) ms:", README.split("## How fast?")[1])
    assert [tuple(map(float, pair)) for pair in found] == numbers
    load = record_rows("serve_many")["load"]
    (rates,) = re.findall(r"\| pictures in a second .*\| (\d+) \| (\d+): the engine", README)
    assert [int(rate) for rate in rates] == [round(1e6 / load[name].p50_us) for name in ("HTTP", "engine.submit")]
    for page in ("README.md", "docs/index.md"):
        said = re.search(r"takes ([\d.]+) ms on two.*take ([\d.]+) ms in", (ROOT / page).read_text(encoding="utf-8"))
        assert said and tuple(map(float, said.groups())) == numbers[0]


def test_the_costs_are_those_of_the_record() -> None:
    load, on_ray = record_rows("serve_many")["load"], record_rows("serve")["load on Ray"]
    milliseconds = [t.p50_us / 1e3 for t in (load["engine.submit"], load["HTTP"], on_ray["HTTP, Ray Serve"])]
    table = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    found = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|\n", table)
    assert found == [(f"{one:.2f}", f"{one / 3.6:.2f}") for one in milliseconds]


PAGES = sorted(str(path.relative_to(ROOT / "docs")).replace("\\", "/") for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_links_lead_somewhere(file: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / file).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / file).parent / target).exists(), f"{file} links to {target}"


def test_every_page_is_in_the_sites_navigation() -> None:
    yaml = pytest.importorskip("yaml")

    def pages(part: Any) -> list[str]:
        return (
            [part]
            if isinstance(part, str)
            else [p for one in part for p in pages(one if isinstance(part, list) else part[one])]
        )

    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(pages(yaml.safe_load(config)["nav"])) == PAGES


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    engine = (tmp_path / "site/api/engine/index.html").read_text(encoding="utf-8")
    assert "imagine_flash.engine.Engine.generate" in engine
