"""Short names for the student and artifact that all tests share, and a copy that a test may damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def student(tiny_student: Path) -> Path:
    return tiny_student


@pytest.fixture(scope="session")
def artifact(tiny_artifact: Path) -> Path:
    return tiny_artifact


@pytest.fixture
def artifact_copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))
