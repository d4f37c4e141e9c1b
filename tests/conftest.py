"""Settings of every test: nothing is downloaded, small models run on one thread, GPU tests say why they are skipped."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

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
def once_a_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once_a_run(name, make): the folder that make(folder) wrote, once for all worker processes of a run; read it only."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                make(shared / f"{name}.new")
                (shared / f"{name}.new").rename(shared / name)
        return shared / name

    return made


@pytest.fixture(scope="session")
def tiny_student(once_a_run: Callable[..., Path]) -> Path:
    """A student folder of real classes with small random weights, float16."""
    from imagine_flash.tests.pipelines import build_student

    return once_a_run("student", build_student)


@pytest.fixture(scope="session")
def tiny_artifact(once_a_run: Callable[..., Path], tiny_student: Path) -> Path:
    """Its artifact folder, made by the export command's function in about ten seconds."""
    from imagine_flash.export import ExportOptions, export_student

    options = ExportOptions(name="tiny", batch=(1, 3))
    return once_a_run("artifact", lambda out: export_student(tiny_student, out, options=options))
