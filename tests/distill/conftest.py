"""A teacher for tests that only read it."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def teacher(once_a_run: Callable[..., Path]) -> Path:
    """A diffusers folder of real classes with small random weights, float32."""
    from imagine_flash.tests.pipelines import build_pipeline

    return once_a_run("teacher", lambda folder: build_pipeline().save_pretrained(folder, safe_serialization=True))
