"""`imagine-flash generate --prompts`: every line of a file, drawn into a folder that goes on where it was stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagine_flash.benchmarks.picture_folders import pictures_in
from imagine_flash.tests.commands import fails, run


def test_every_line_of_a_file_is_drawn_into_a_folder(tiny_artifact: Path, tmp_path: Path) -> None:
    """With what drew them beside them; a second run draws what is missing, a folder of others is refused."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    prompts.write_text("a cat\n\na dog below a zebra\na fox\n", encoding="utf-8")
    asked = ["generate", "--prompts", prompts, "-o", out, "--model", tiny_artifact, "--steps", "2"]
    done = run(*asked)
    assert done.returncode == 0 and done.stdout == f"{out} (3 pictures, 3 of them new)\n"
    assert "no word for zebra; drawn without" in done.stderr
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["text"], row["seed"], row["steps"]) for row in rows] == [
        ("0001.png", "a cat", 0, 2),
        ("0002.png", "a dog below a zebra", 1, 2),
        ("0003.png", "a fox", 2, 2),
    ]
    assert sorted(shown.caption for shown in pictures_in(out).values()) == sorted(row["text"] for row in rows)
    run("generate", "a fox", "--seed", "2", "--steps", "2", "--model", tiny_artifact, "-o", tmp_path / "fox.png")
    alone, among = (np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "fox.png", out / "0003.png"))
    assert np.abs(alone - among).max() <= 1
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "0002.png").unlink()
    with (out / "metadata.jsonl").open("a") as lines:
        lines.write('{"file_name": "00')  # as a killed run leaves it
    assert run(*asked).stdout == f"{out} (3 pictures, 2 of them new)\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "line 1, is of another prompt, seed, plan, size, LoRA or model" in fails(*asked, "--seed", "5")
    prompts.write_text("a cat\n")
    assert "line 2, is of another" in fails(*asked)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_does_not_go_on_with_other_options(tiny_artifact: Path, tmp_path: Path) -> None:
    """It held pictures of two negative prompts, and said nothing."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    prompts.write_text("a cat\n", encoding="utf-8")
    asked = ["generate", "--prompts", prompts, "-o", out, "--model", tiny_artifact, "--guidance", "3"]
    assert run(*asked).returncode == 0
    assert "line 1, is of another prompt, seed, plan, size, LoRA" in fails(*asked, "--negative-prompt", "a dog")


def test_typos_and_prompts_that_were_cut_are_said_once_for_all(tiny_artifact: Path, tmp_path: Path) -> None:
    """A single PROMPT said so, a file of them nothing."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    prompts.write_text("a rockett\na rockett on the moon\na cat\n" + 2 * ("a cat " * 200 + "\n"), encoding="utf-8")
    done = run("generate", "--prompts", prompts, "-o", out, "--model", tiny_artifact, "--steps", "1")
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert "note: read 'rockett' as 'rocket'; metadata.jsonl has the text as given" in notes
    assert (
        "note: 2 of the prompts are longer than this model reads, and were cut; metadata.jsonl has the text as given"
        in notes
    )
    assert "a rockett" in (out / "metadata.jsonl").read_text()


def test_of_two_prompts_the_one_that_was_cut_is_named(tiny_artifact: Path, tmp_path: Path) -> None:
    """A long negative prompt was said to be the prompt, and to be one of those of a file."""
    (tmp_path / "prompts.txt").write_text("a cat\na fox\n", encoding="utf-8")
    asked = ["--model", tiny_artifact, "--steps", "1", "--guidance", "3", "--negative-prompt", "a dog " * 200]
    one = run("generate", "a cat", "-o", tmp_path / "cat.png", "--json", *asked)
    many = run("generate", "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "pictures", *asked)
    for done in (one, many):
        assert done.stderr.count("longer than this model reads") == 1
        assert "note: the negative prompt is longer than this model reads; left out: '" in done.stderr
    facts = json.loads(one.stdout)
    assert facts["cut"] == "" and facts["cut_negative"].endswith("a dog")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "got nothing to draw: a PROMPT is drawn into a file"),
        (["a cat", "--prompts", "FILE"], "got a PROMPT and --prompts; leave out one"),
        (["--prompts", "FILE"], "needs a folder for its pictures, got none: -o FOLDER"),
        (["--prompts", "FILE", "-o", "cat.png"], "needs a folder for its pictures, got cat.png"),
        (["--prompts", "FILE", "-o", "out", "--image", "cat.png"], "from text alone; leave out --image"),
        (["--prompts", "FILE", "-o", "out", "--count", "2"], "from text alone; leave out --count"),
        (["--prompts", "FILE", "-o", "out", "--strength", "0.5"], "from text alone; leave out --strength"),
        (["--prompts", "FILE", "-o", "out", "--condition-scale", "1"], "from text alone; leave out --condition-scale"),
        (["--prompts", "nowhere.txt", "-o", "out"], "cannot read prompts from nowhere.txt"),
        (["--prompts", "FILE", "-o", "nowhere/out"], "nowhere is not a folder; make it first"),
        (["--prompts", "FILE", "-o", "taken"], "taken holds other files and no metadata.jsonl; name a new folder"),
    ],
)
def test_what_cannot_be_drawn_into_a_folder(
    arguments: list[str], says: str, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    typed = ["prompts.txt" if argument == "FILE" else argument for argument in arguments]
    assert says in fails("generate", "--model", tiny_artifact, *typed)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "prompts.txt", "taken"]
