"""The house holds: imports run one way, the package list equals the tree, importing the runtime brings in no torch."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_PACKAGE = {"tests", "docs", "deploy", "build", "dist", "runs"}
MAY_IMPORT = {  # room -> the rooms it may import; the top-level files are the room ""
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "pipelines": {"core", "pipelines"},
    "engine": {"core", "kernels", "pipelines", "engine"},
    "distill": {"core", "distill"},
    "export": {"core", "pipelines", "export"},
}
ALL_ROOMS = {*MAY_IMPORT, "benchmarks"}
MAY_IMPORT |= {
    "benchmarks": ALL_ROOMS,
    "cli": ALL_ROOMS | {"cli"},
    "__init__.py": {"core", "engine"},
    "__main__.py": {"cli"},
}


def package_files() -> list[Path]:
    """Every Python file of the package, relative to the root."""
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return sorted(f for f in files if f.parts[0] not in NOT_PACKAGE and not any(part[0] == "." for part in f.parts))


def imported_modules(source: str, file: Path) -> Iterator[tuple[str, ...]]:
    """The dotted names a file imports, relative ones resolved as in the package imagine_flash."""
    package = ("imagine_flash", *file.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            assert base or not node.level, f"{file}:{node.lineno} climbs out of the package"
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def wrong_imports(source: str, file: Path) -> list[str]:
    """The rooms imported against the rule, as 'room'."""
    allowed = MAY_IMPORT.get(file.parts[0], set())
    own = (name[1] for name in imported_modules(source, file) if name[0] == "imagine_flash" and len(name) > 1)
    known = ALL_ROOMS | {"cli", "tests", "assets", "docs"}
    return sorted({room for room in own if room in known and room not in allowed})


def outside_imports(source: str, file: Path) -> set[str]:
    """The top-level packages a file imports that are neither ours nor the standard library's."""
    return {name[0] for name in imported_modules(source, file)} - sys.stdlib_module_names - {"imagine_flash"}


def test_imports_run_one_way():
    files = package_files()
    assert len(files) > 10
    wrong = {str(f): rooms for f in files if (rooms := wrong_imports((ROOT / f).read_text(encoding="utf-8"), f))}
    assert not wrong, f"core <- kernels <- engine, core <- pipelines <- export and engine, core <- distill; but {wrong}"
    strangers = {f.parts[0] for f in files} - MAY_IMPORT.keys()
    assert not strangers, f"rooms without a rule: {strangers}"


@pytest.mark.parametrize(
    ("source", "file", "rooms"),
    [
        ("from ..distill import losses", "core/plan.py", ["distill"]),
        ("from .. import engine", "core/plan.py", ["engine"]),
        ("from ...distill.data import emoji", "engine/backends/torch.py", ["distill"]),
        ("def f():\n    import imagine_flash.export.onnx", "distill/trainer.py", ["export"]),
        ("from imagine_flash import engine", "export/onnx.py", ["engine"]),
        ("from ..kernels.update import update", "distill/trainer.py", ["kernels"]),
        ("from ..kernels.update import update", "engine/engine.py", []),
        ("from ...pipelines.stages import Stages", "engine/backends/torch.py", []),
        ("from ..engine.engine import Engine", "pipelines/stages.py", ["engine"]),
        ("from ..export.onnx import StageGraph", "pipelines/stages.py", ["export"]),
        ("from ..core.schedule import NoiseSchedule", "cli/generate.py", []),
        ("from .schedule import NoiseSchedule", "core/plan.py", []),
        ("from ..tests import pipelines", "benchmarks/latency.py", ["tests"]),
    ],
)
def test_the_reader_of_imports_sees_them(source, file, rooms):
    assert wrong_imports(source, Path(file)) == rooms


def test_the_runtime_reads_pipelines_in_one_place():
    """It needs torch; so does what imports it."""
    readers = [
        str(f)
        for f in package_files()
        if f.parts[0] == "engine"
        and any(
            name[:2] == ("imagine_flash", "pipelines") for name in imported_modules((ROOT / f).read_text("utf-8"), f)
        )
    ]
    assert readers == ["engine/backends/torch.py"]


def test_core_needs_numpy_and_pydantic_only():
    for file in package_files():
        if file.parts[0] == "core":
            outside = outside_imports((ROOT / file).read_text(encoding="utf-8"), file)
            assert outside <= {"numpy", "pydantic"}, f"{file} imports {outside}"


def test_kernels_has_no_init():
    """With one, a root on sys.path shadows Hugging Face's package `kernels`, and transformers fails to import."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_package_list_equals_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert listed == sorted(set(listed))
    assert set(listed) == {".".join(("imagine_flash", *file.parent.parts)) for file in package_files()}
    for file in package_files():
        if file.parts[0] != "kernels":
            assert (ROOT / file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py"


def modules_after(statement: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `statement`."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import imagine_flash.engine", "from imagine_flash import Engine", "import imagine_flash.cli"]
)
def test_importing_the_runtime_brings_in_no_torch(statement):
    assert not modules_after(statement) & {"torch", "diffusers", "transformers", "accelerate", "onnx", "triton"}


def test_importing_the_package_brings_in_nothing():
    assert not modules_after("import imagine_flash") & {"numpy", "pydantic", "torch", "onnxruntime"}


def test_the_public_names():
    import imagine_flash

    assert {"Engine", "NoiseSchedule", "__version__"} <= set(dir(imagine_flash))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert imagine_flash.__version__ == project["version"]
    assert imagine_flash.NoiseSchedule.__name__ == "NoiseSchedule"
    assert imagine_flash.Engine.__name__ == "Engine"
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = imagine_flash.Motor  # type: ignore[attr-defined]
