"""Settings of every test: nothing is downloaded, small models run on one thread, GPU tests say why they are skipped."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("IMAGINE_FLASH_CACHE", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path(
    "/dev/nvidiactl"
).exists():  # without a GPU the kernels run in Triton's interpreter, which is chosen at import
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_student() -> Path:
    """A student folder of real classes with small random weights."""
    from imagine_flash.tests import pipelines

    return pipelines.shared_student()


@pytest.fixture(scope="session")
def tiny_artifact() -> Path:
    """Its artifact folder, made by the export command's function."""
    from imagine_flash.tests import pipelines

    return pipelines.shared_artifact()
