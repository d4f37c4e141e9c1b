"""Methods of distillation: one file each, listed here by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.errors import RecipeError, nearest
from ..recipe import DistillRecipe, parse_recipe, read_with_base
from . import add, dmd2, flash, imagine_flash, lcm, step_distillation
from .contract import Method

METHODS: dict[str, Method] = {
    "imagine_flash": imagine_flash.METHOD,
    "step_distillation": step_distillation.METHOD,
    "lcm": lcm.METHOD,
    "add": add.METHOD,
    "dmd2": dmd2.METHOD,
    "flash": flash.METHOD,
}
DEFAULT = "imagine_flash"


def method_named(name: object) -> Method:
    """The METHOD of the file of that name. Raises RecipeError that lists the names there are."""
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(f"no method {name!r}{nearest(str(name), METHODS)}; there are {', '.join(METHODS)}")
    return METHODS[name]


def distill_recipe(values: dict[str, Any], source: str | Path = "the recipe") -> Any:
    """The recipe of `values["method"]`, validated. Raises RecipeError."""
    kind: type[DistillRecipe] = method_named(values.get("method", DEFAULT)).recipe
    return parse_recipe(values, kind, source)


def load_distill_recipe(name_or_path: str | Path) -> Any:
    """A built-in recipe by name or any YAML file by path; what names a `base` need only hold what differs. Raises RecipeError."""
    values, path = read_with_base(name_or_path)
    return distill_recipe(values, path)
