"""What the commands share: early refusals, and how they speak."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import typer

from ..core.errors import ImagineFlashError, missing_extra

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def say(line: str) -> None:
    typer.echo(line)


def needs(extra: str, *packages: str) -> None:
    """One line that says what to install where a package is missing; and less noise from those that are there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def training() -> None:
    needs("train", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "PIL", "yaml")


def image_format(path: Path) -> str:
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise ImagineFlashError(f"cannot write {path.name!r}: its ending must be one of {', '.join(IMAGE_FORMATS)}")
    return IMAGE_FORMATS[path.suffix.lower()]


def writable(path: Path) -> None:
    """Refuse early, before minutes of work, what could not be written at the end."""
    parent = path.parent
    if not parent.is_dir():
        raise ImagineFlashError(f"cannot write {path}: {parent} is not a folder; make it first")
    if not os.access(parent, os.W_OK):
        raise ImagineFlashError(f"cannot write {path}: {parent} is read-only; choose another place")
    if path.suffix.lower() in IMAGE_FORMATS and path.is_dir():
        raise ImagineFlashError(f"cannot write {path}: it is a folder")
