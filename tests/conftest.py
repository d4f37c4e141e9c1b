"""Settings of every test: nothing is downloaded, small models run on one thread, GPU tests say why they are skipped."""

import gc
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
gc.set_threshold(50_000)  # as the command has it

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("IMAGINE_FLASH_CACHE", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path(
    "/dev/nvidiactl"
).exists():  # without a GPU the kernels run in Triton's interpreter, which is chosen at import
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _is_for_a_gpu(path: Path) -> bool:
    """Tests of what only hardware shows, and those of the kernels, whose oracles hold there too."""
    return path.parent.name == "kernels" or "mark.gpu" in path.read_text(encoding="utf-8")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` reads no other files: a machine with a GPU needs no server, browser or exporter."""
    if config.option.markexpr != "gpu" or not collection_path.is_relative_to(HERE):
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any(_is_for_a_gpu(file) for file in files) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    kernels = [item for item in items if item.path.parent == HERE / "kernels" and not item.get_closest_marker("slow")]
    if not gpu and not kernels:
        return
    import torch

    there = torch.cuda.is_available()
    for item in kernels if there else ():
        item.add_marker(pytest.mark.gpu)
    for item in gpu if not there else ():
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def once_a_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once_a_run(name, make): the folder that make(folder) wrote, once for all worker processes of a run; read it only. Where
    IMAGINE_FLASH_TEST_FOLDER names a folder, once for all runs that share it."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder
    if several := os.environ.get("IMAGINE_FLASH_TEST_FOLDER"):
        shared = Path(several)
        shared.mkdir(parents=True, exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        from filelock import FileLock

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


@pytest.fixture(scope="session")
def two_sizes(once_a_run: Callable[..., Path], tiny_student: Path) -> Path:
    """Another of its artifacts: square and wide, in one step, in the formats that can be written here."""
    from imagine_flash.export import ExportOptions, export_student

    formats: Any = ("triton-repository", *(["openvino"] if find_spec("openvino") else []))
    options = ExportOptions(sizes=((64, 64), (64, 128)), steps=(1,), batch=(1, 2), formats=formats)
    return once_a_run("two_sizes", lambda out: export_student(tiny_student, out, options=options))
