"""The wheel, as a newcomer meets it: small, complete, and drawing a picture where there is no torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagine_flash.folders.reading import read_artifact_manifest

ROOT = Path(__file__).parents[1]
ARTIFACT = ROOT / "assets/emoji/artifact"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the files that git would track, so that nothing left over in the tree gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    reach = run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder / "x", "wheel", cwd=folder)
    if reach.returncode:
        pytest.skip(f"the package index is not reachable: {reach.stderr.strip().splitlines()[-1]}")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    assert listed.returncode == 0, listed.stderr
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "source", cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("imagine_flash-*.whl")
    return path


def test_the_wheel_holds_the_package_and_the_artifact_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top.split("-")[0] for top in tops} == {"imagine_flash"}, tops
    inside = {name.split("/", 1)[1] for name in names}
    rooms = {name.split("/")[0] for name in inside}
    assert not rooms & {"tests", "docs", "runs", "build"}, rooms
    assert not [name for name in inside if "/teacher/" in name or "/student/" in name or "full_size" in name]
    assert {"__init__.py", "cli/__init__.py", "core/schedule.py", "engine/__init__.py", "licenses/LICENSE"} <= inside
    assert any(name.startswith("distill/recipes/") for name in inside)
    assert "licenses/assets/emoji/FONT_LICENSE.txt" in inside
    assert (ARTIFACT / "manifest.json").is_file(), "assets/emoji/artifact is missing: run imagine-flash export"
    files = read_artifact_manifest(ARTIFACT).files
    assert {f"assets/emoji/artifact/{name}" for name in [*files, "manifest.json"]} <= inside


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size <= 30e6, f"{wheel.stat().st_size / 1e6:.1f} MB"


@pytest.mark.timeout(600)
def test_the_wheel_draws_without_torch_from_another_folder(wheel, tmp_path):
    made = run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    installed = run(programs / "python", "-m", "pip", "install", "-q", f"{wheel}[cpu]", cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    drawn = run(programs / "imagine-flash", "generate", "a cat", "-o", "out.png", cwd=elsewhere)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    with Image.open(elsewhere / "out.png") as image:
        pixels = np.asarray(image)
        assert image.format == "PNG"
    assert list(pixels.shape) == [*read_artifact_manifest(ARTIFACT).image_size, 3]
    assert pixels.std() > 5, "the picture is nearly constant"
    assert run(programs / "python", "-c", "import torch", cwd=elsewhere).returncode != 0
    for command in (
        ["distill", "a", "b"],
        ["export", "a", "b"],
        ["train-teacher", "a"],
        ["evaluate"],
        ["bench", "kernels"],
    ):
        refused = run(programs / "imagine-flash", *command, cwd=elsewhere)
        assert refused.returncode == 2 and "pip install" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert [path.name for path in elsewhere.iterdir()] == ["out.png"]
