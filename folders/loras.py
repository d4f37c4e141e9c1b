"""LoRAs as they are named: a file, folder or hub id, what requests call it, and a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ArtifactError

NAME = re.compile(r"[\w.+()-][\w .+()-]{0,99}")  # what can be written into a prompt as <lora:NAME:0.8>

WEIGHT = re.compile(r"-?(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class Lora:
    """A LoRA file, folder or hub id, and the weight that it is added with."""

    name: str
    weight: float = 1.0


def parse_lora(text: str) -> Lora:
    """ "style.safetensors" or "style.safetensors:0.8" -> the LoRA and its weight. Raises ArtifactError."""
    path, weight = re.fullmatch(r"(.*?)(?::([^:/\\]*))?", text.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
    if weight is not None and weight.endswith(".safetensors"):
        path, weight = text.strip(), None  # a colon in the file's name
    wrong = "" if path else ": there is no path"
    if weight is not None and not re.fullmatch(WEIGHT, weight):
        wrong = f": the weight {weight!r} is no number"
    if wrong:
        raise ArtifactError(f"a LoRA is PATH or PATH:WEIGHT such as style.safetensors:0.8, got {text!r}{wrong}")
    return Lora(path, float(weight or 1.0))


def parse_named(texts: Iterable[str]) -> dict[str, Lora]:
    """ "pixel=style.safetensors:0.8", or without the name, which is then that of the file -> LoRAs by name.

    Raises ArtifactError, also for a name that is there twice or that no prompt can hold.
    """
    found: dict[str, Lora] = {}
    for text in texts:
        before, equals, after = text.partition("=")
        is_named = bool(equals) and "/" not in before and "\\" not in before
        lora = parse_lora(after if is_named else text)
        name = check_name(before.strip() if is_named else Path(lora.name).name.removesuffix(".safetensors"))
        if name in found:
            raise ArtifactError(f"two LoRAs are called {name!r}; give one another name: NAME={lora.name}")
        found[name] = lora
    return found


def check_name(name: str) -> str:
    """Raises ArtifactError for a name that requests cannot write."""
    if not NAME.fullmatch(name):
        raise ArtifactError(
            f"a LoRA's name has up to 100 letters, digits, spaces and ._+()-, got {name!r}; NAME=PATH gives one"
        )
    return name
