"""The house holds: imports run one way, the package list equals the tree, importing the runtime brings in no torch."""

import ast
import graphlib
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
    "folders": {"core", "folders"},
    "kernels": {"core", "kernels"},
    "models": {"core", "folders", "models"},
    "pipelines": {"core", "folders", "kernels", "models", "pipelines"},
    "engine": {"core", "folders", "kernels", "models", "pipelines", "engine"},
    "distill": {"core", "folders", "pipelines", "distill"},
    "export": {"core", "folders", "models", "pipelines", "export"},
}
ALL_ROOMS = {*MAY_IMPORT, "benchmarks"}
MAY_IMPORT |= {
    "benchmarks": ALL_ROOMS,
    "cli": ALL_ROOMS | {"cli"},
    "__init__.py": {"core", "engine"},
    "__main__.py": {"cli"},
}


def package_files() -> list[Path]:
    """Every Python file of the package, relative to the root; virtual environments beside it are none of it."""
    others = {*NOT_PACKAGE, *(path.parent.name for path in ROOT.glob("*/pyvenv.cfg"))}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return sorted(f for f in files if f.parts[0] not in others and not any(part[0] == "." for part in f.parts))


def imported_modules(source: str, file: Path) -> Iterator[tuple[str, ...]]:
    """The dotted names a file imports anywhere in it, by import_module too; relative ones resolved as in imagine_flash."""
    package = ("imagine_flash", *file.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if file.parts[0] == "tests" and name is None:
                continue
            assert isinstance(name, str), f"{file}:{node.lineno}: import_module of a name that nobody can read here"
            climbs = len(name) - len(name.lstrip("."))
            yield (*(package[: len(package) - climbs + 1] if climbs else ()), *name.lstrip(".").split("."))
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            assert base or not node.level, f"{file}:{node.lineno} climbs out of the package"
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def own_modules() -> dict[tuple[str, ...], Path]:
    """The package's modules by their dotted names."""
    names = {file: ("imagine_flash", *file.with_suffix("").parts) for file in package_files()}
    return {name[:-1] if name[-1] == "__init__" else name: file for file, name in names.items()}


def import_graph() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Module -> the modules of ours that it imports, at its top, in a function or for its types alone."""
    modules, graph = own_modules(), {}
    for name, file in modules.items():
        asked = {one for one in imported_modules((ROOT / file).read_text("utf-8"), file) if one[0] == "imagine_flash"}
        graph[name] = {one if one in modules else one[:-1] for one in asked} - {name}
    return graph


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
    assert not wrong, f"docs/architecture.md says which room may import which; but {wrong}"
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
        (
            "from importlib import import_module\nimport_module('..distill.losses', __package__)",
            "export/onnx.py",
            ["distill"],
        ),
        ("import importlib\nimportlib.import_module('imagine_flash.engine')", "core/plan.py", ["engine"]),
        ("if TYPE_CHECKING:\n    from ..cli import app", "engine/engine.py", ["cli"]),
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


def test_what_is_imported_is_there():
    """Of the tests too: those that a rename broke are found without running them."""
    modules = own_modules()
    rooms = {name[:2] for name in modules}
    lost = []
    for file in (*package_files(), *(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))):
        for name in imported_modules((ROOT / file).read_text(encoding="utf-8"), file):
            holder = modules.get(name[:-1])
            there = name in modules or (holder and name[-1] in (ROOT / holder).read_text(encoding="utf-8"))
            if name[:2] in rooms and not there:
                lost.append(f"{file}: {'.'.join(name)}")
    assert not lost


def test_no_circle_of_imports():
    """Not even for types: what two files need of one another stands in a third."""
    try:
        graphlib.TopologicalSorter(import_graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(".".join(name[1:]) for name in error.args[1]))


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


def test_what_core_and_folders_need_of_others():
    known = {"core": {"numpy", "pydantic"}, "folders": {"pydantic", "huggingface_hub", "tensorrt"}}
    for file in package_files():
        outside = outside_imports((ROOT / file).read_text(encoding="utf-8"), file)
        assert outside <= known.get(file.parts[0], outside), f"{file} imports {outside}"


def test_kernels_has_no_init():
    """With one, a root on sys.path shadows Hugging Face's package `kernels`, and transformers fails to import."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_package_list_equals_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert listed == sorted(set(listed))
    there = {".".join(("imagine_flash", *file.parent.parts)) for file in package_files()}
    assert set(listed) == there - {"imagine_flash.benchmarks.full_size"}  # of records alone: in a checkout, in no wheel
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
