"""The docs say what is: tables come from records, every option is described, the README's commands run."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_table_is_the_record() -> None:
    from imagine_flash.benchmarks.quality.tables import as_markdown

    record = json.loads((ROOT / "docs/results/emoji_scenes.json").read_text(encoding="utf-8"))
    assert as_markdown(record) in README


def test_the_full_size_table_is_of_the_records() -> None:
    table = (ROOT / "docs/export.md").read_text(encoding="utf-8").split("## Full size")[1]
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
    return found | {f"bench {name}": command for name, command in found.pop("bench").commands.items()}


def test_the_reference_of_commands_is_what_their_help_says() -> None:
    """docs/cli.md is made by `python -m typer imagine_flash.cli utils docs --name imagine-flash --title "Command line"
    --output docs/cli.md`; compared by what it says, since each Typer lays it out anew."""
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    parts = {part.splitlines()[0].strip("` "): part for part in page.split("## `imagine-flash ")[1:]}
    assert parts.keys() - {"bench"} == commands().keys()
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
    from imagine_flash.benchmarks.harness import read_record

    rows = read_record(ROOT / f"docs/results/{name}.json").rows
    return {str(row.case["what"]): row for row in rows if case.items() <= row.case.items()}


def test_the_readmes_times_are_those_of_the_records() -> None:
    runtime, serve = record_rows("runtime"), record_rows("serve")
    typing = record_rows("serve", sessions=16)["typing"]
    pairs = [
        (runtime["one picture"], "Engine.load(): openvino bf16", "diffusers, torch eager"),
        (runtime["cold start"], "onnxruntime", "diffusers, torch eager"),
        (typing, "latest wins", "every key in turn"),
        (serve["load"], "HTTP", "engine.submit"),
    ]
    expected = [tuple(f"{row[name].p50_us / 1e3:#.3g}" for name in names) for row, *names in pairs]
    found = re.findall(r"\| ([\d.]+) ms \| ([\d.]+) ms:", README.split("## How fast?")[1])
    assert [tuple(map(float, pair)) for pair in found] == [tuple(map(float, pair)) for pair in expected]


def test_the_costs_are_those_of_the_record() -> None:
    rows = record_rows("serve")
    load, on_ray = rows["load"], rows["load on Ray"]
    milliseconds = [t.p50_us / 1e3 for t in (load["engine.submit"], load["HTTP"], on_ray["HTTP, Ray Serve"])]
    table = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    found = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|\n", table)
    assert found == [(f"{one:.2f}", f"{one / 3.6:.2f}") for one in milliseconds]


def test_what_tritons_client_is_told_to_send_draws_the_engines_picture() -> None:
    """The first block of docs/scaling.md, with the embedded artifact; its inputs go to the graph that Triton would run."""
    import numpy as np
    import onnxruntime

    from imagine_flash.engine import Engine, GenerateRequest

    artifact = ROOT / "assets/emoji/artifact"
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scaling.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    scope: dict = {}
    exec(block.replace('Path("OUT")', f'Path(r"{artifact}")'), scope)
    session = onnxruntime.InferenceSession(artifact / "sampler_3.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.run(["images"], scope["inputs"])
    with Engine.load(artifact, backend="onnxruntime") as engine:
        expected = engine.generate(GenerateRequest(prompt="a fox on a pink background", seed=7, steps=3)).images
    assert np.abs(np.asarray(images).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / file).parent / target).exists(), f"{file} links to {target}"


def test_the_readmes_python_runs() -> None:
    """The lines as they stand there, in a fresh scope."""
    block = README.split("In Python:")[1].split("For everything else")[0]
    scope: dict = {}
    exec("\n".join(line.strip() for line in block.strip().splitlines()), scope)
    assert scope["images"].shape == (1, 64, 64, 3) and scope["images"].std() > 10


def test_the_runtimes_python_runs() -> None:
    """All blocks of docs/runtime.md in one scope, one after the other."""
    found: list = []
    scope: dict = {"deliver": found.append}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/runtime.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(block, scope)
    limit = time.monotonic() + 30
    while not any(one.seq == 2 and not one.preview for one in found) and time.monotonic() < limit:
        time.sleep(0.01)
    scope["engine"].close()
    assert scope["result"].images.shape == (1, 64, 64, 3)
    assert [one.seq for one in found][-2:] == [2, 2] and all(one.error is None for one in found)


def test_the_readmes_commands_are_the_ones_that_are_tested() -> None:
    """The first is run by tests/test_wheel.py in a fresh environment, the second is this run."""
    assert 'pip install ".[cpu]" && imagine-flash generate "a fox on a pink background" -o fox.png' in README
    assert 'pip install -e ".[test]" && pytest' in README
