"""The cache: what is listed, removed, and cleared away."""

import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from imagine_flash.folders.cache import cached, export_folder, mark_used
from imagine_flash.tests.commands import fails, run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two exports, one of an older version; links of a student, broken ones of another; compiled graphs; half-written folders."""
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path))
    here, tiny = version("imagine-flash"), tmp_path / "weights"
    tiny.write_bytes(bytes(10))
    for folder, file in (
        (f"exports/0123-{here}/turbo", "manifest.json"),
        ("exports/4567-0.0.1/turbo", "manifest.json"),
        ("students/0123/turbo", "imagine_flash.json"),
        ("students/89ab/gone", "imagine_flash.json"),
        ("openvino/compiled", "a.blob"),
        (f"exports/0123-{here}/.turbo.tmp-0123abcd", "manifest.json"),
        (f"exports/cdef-{here}/.other.tmp-0123abcd", "manifest.json"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "students/0123/turbo/weights").symlink_to(tiny)
    (tmp_path / "students/89ab/gone/weights").symlink_to(tmp_path / "nowhere")
    old = time.time() - 2 * 86400
    os.utime(tmp_path / f"exports/0123-{here}/.turbo.tmp-0123abcd", (old, old))
    return tmp_path


def names(root: Path) -> list[str]:
    return sorted(one.path.relative_to(root).as_posix() for one in cached())


def test_everything_is_listed_with_its_size(root: Path) -> None:
    here = version("imagine-flash")
    assert names(root) == [
        f"exports/0123-{here}/turbo",
        "exports/4567-0.0.1/turbo",
        "openvino",
        "students/0123/turbo",
        "students/89ab/gone",
    ]
    listed = json.loads(run("cache", "list", "--json").stdout)
    assert {one["bytes"] for one in listed if one["kind"] == "exports"} == {2}, "links are not counted"
    done = run("cache", "list")
    assert "turbo" in done.stdout and "now" in done.stdout and str(root) in done.stderr


def test_pruning_leaves_what_is_used(root: Path) -> None:
    here = version("imagine-flash")
    gone = run("cache", "prune", "--days", "1").stdout
    assert "0.0.1/turbo" in gone and "gone" in gone and ".turbo.tmp-0123abcd" in gone and ".other.tmp" not in gone
    assert names(root) == [f"exports/0123-{here}/turbo", "openvino", "students/0123/turbo"]
    assert (root / "weights").is_file() and not (root / "exports/4567-0.0.1").exists()
    folder = export_folder("0123", "turbo")
    assert folder is not None
    week = time.time() - 7 * 86400
    os.utime(folder, (week, week))
    mark_used(folder)
    assert run("cache", "prune", "--days", "5").stdout == ""
    os.utime(folder, (week, week))
    assert f"removed {folder}" in run("cache", "prune", "--days", "5").stdout


def test_what_a_server_takes_away_meanwhile_stops_neither(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It happened that a file which was renamed between the listing of its folder and the look at it stopped both."""
    compiled, exported = root / "openvino/compiled", root / "exports/4567-0.0.1/turbo"
    look, rename = Path.lstat, os.rename

    def vanishing(path: Path) -> os.stat_result:
        if path.parent == compiled:
            shutil.rmtree(compiled)
        return look(path)

    monkeypatch.setattr(Path, "lstat", vanishing)
    assert "openvino" in names(root) and not compiled.exists()
    monkeypatch.setattr(Path, "lstat", look)

    def slower(one: Path, other: Path) -> None:
        if one == exported:
            shutil.rmtree(one)
        if one == root / "students/89ab/gone":
            raise PermissionError(1, "Not permitted")
        rename(one, other)

    monkeypatch.setattr(os, "rename", slower)
    said = fails("cache", "prune", "--days", "1")
    assert "students/89ab/gone: not permitted; 1 of 3 were removed" in said
    assert not list(root.glob("exports/*/.turbo.tmp-*")), "what came later was left"


def test_removing_by_name(root: Path) -> None:
    assert "the cache has no 'turbos'; did you mean 'turbo'?" in fails("cache", "remove", "turbo", "turbos")
    assert len(names(root)) == 5
    assert run("cache", "remove", "turbo").stdout.count("removed ") == 3 and names(root) == [
        "openvino",
        "students/89ab/gone",
    ]
    assert "days" in fails("cache", "prune", "--days", "-1")
