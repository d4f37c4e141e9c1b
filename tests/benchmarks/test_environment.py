"""What a record says of machine and checkout, and that no path of the machine gets into it."""

import subprocess
from pathlib import Path

import pytest

from imagine_flash.benchmarks.environment import command_line, git_of, refuse_paths, without_paths


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/srv/models/a", "a"),
        ("/srv/models/a/", "a"),
        ("--out=/srv/my records/a.json", "--out=a.json"),
        ("a=/x/b,c=/y/d", "a=b,c=d"),
        ("src:/srv/x:/srv/y", "src:x:y"),
        ("//srv/a", "a"),
        ("~/records/a.json", "a.json"),
        ("~someone/a.json", "a.json"),
        ("file:///srv/a.onnx", "a.onnx"),
        (r"C:\models\a", "a"),
        (r"--model=\\server\share\a", "--model=a"),
        ("docs/results/a.json", "docs/results/a.json"),
        ("../a.json", "../a.json"),
        ("http://127.0.0.1:8000/v1/images", "http://127.0.0.1:8000/v1/images"),
        ("a and/or b / c", "a and/or b / c"),
        ("--batch=1/2", "--batch=1/2"),
    ],
)
def test_paths_of_the_machine_give_way_to_base_names(argument: str, kept: str) -> None:
    assert without_paths(argument) == kept
    assert refuse_paths(command_line(["/usr/bin/bench", argument])).startswith("bench ")


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    """A folder outside any checkout, or below the top of another's, has none; what changes below docs/ is no change."""

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    try:
        assert git_of(tmp_path) is None
        git("init")
    except FileNotFoundError:
        pytest.skip("needs git")
    assert git_of(tmp_path) is None
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.py").write_text("a = 1\n", encoding="utf-8")
    git("add", "-A")
    git("commit", "-m", "first")
    (tmp_path / "docs/record.json").write_text("{}", encoding="utf-8")
    state = git_of(tmp_path)
    assert state and not state.dirty
    assert git_of(tmp_path / "docs") is None
    (tmp_path / "b.py").write_text("b = 1\n", encoding="utf-8")
    changed = git_of(tmp_path)
    assert changed and changed.dirty and changed.commit == state.commit
