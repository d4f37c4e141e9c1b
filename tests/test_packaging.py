"""pyproject.toml: each bound in one place, and extras that can stand together."""

import ast
import re
import sys
import tomllib
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from imagine_flash.tests.test_structure import package_files

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OURS = re.compile(r"imagine-flash\[([\w,-]+)\]")


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def libraries(extra: str) -> set[str]:
    """What an extra installs, on any machine, beside the dependencies of the package itself."""
    found: set[str] = set()
    for requirement in EXTRAS[extra]:
        named = OURS.match(requirement)
        found |= set().union(*map(libraries, named[1].split(","))) if named else {name_of(requirement)}
    return found


def test_each_library_has_its_bound_in_one_place() -> None:
    every = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra if not OURS.match(one))]
    assert [name for name, times in Counter(map(name_of, every)).items() if times > 1] == []
    assert [one for one in every if ">=" not in one] == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_extra_installs_both_forms_of_onnxruntime(extra: str) -> None:
    """They are one module: whichever is installed last overwrites the other."""
    assert not {"onnxruntime", "onnxruntime-gpu"} <= libraries(extra)
    assert ("onnxruntime-gpu" in libraries(extra)) == (extra in ("cuda", "serve-cuda"))


def test_a_newcomers_tests_need_no_ray_no_browser_and_no_tensorrt() -> None:
    assert not {"ray", "playwright", "tensorrt", "nncf", "onnxruntime-gpu"} & libraries("test")
    assert libraries("test") < libraries("dev")


def test_the_version_is_said_once_more_where_it_is_cited() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in cited


def imported() -> dict[str, str]:
    """The top-level modules that the package imports, also inside functions, each with a file that does."""
    found = {}
    for inside in package_files():
        for node in ast.walk(ast.parse((ROOT / inside).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0]: str(inside) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found[node.module.split(".")[0]] = str(inside)
    return {name: file for name, file in found.items() if name not in (*sys.stdlib_module_names, "imagine_flash")}


def test_every_library_that_is_imported_is_declared() -> None:
    """What another library happens to install today is not there tomorrow."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    declared = {plain(name_of(one)) for one in PROJECT["dependencies"]}
    declared |= {plain(name) for extra in EXTRAS for name in libraries(extra)}
    distributions = packages_distributions()
    missing = {
        name: file
        for name, file in imported().items()
        if not {plain(one) for one in (name, *distributions.get(name, ()))} & declared
    }
    assert not missing
