"""What a benchmark's record says about where its numbers come from: hardware, versions, commit, command line.

Nothing here names a folder of the machine: records are published.
"""

import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..folders.files import atomic_file

PACKAGES = (
    "imagine-flash",
    "numpy",
    "torch",
    "triton",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tokenizers",
    "diffusers",
    "transformers",
)

_PATH = re.compile(
    r"""(^|[=,;\s'"(\[]|:(?!//))"""  # where a path may start; not the // of a URL
    r"""((?:file:)?(?:[A-Za-z]:|~\w*)?[\\/]+(?![\\/\s])[^=,;:'"]*)"""
)


def without_paths(text: str) -> str:
    """`text` with every absolute path in it (also of Windows, `~/...` and file://) replaced by its base name."""
    return _PATH.sub(lambda found: found[1] + _base_name(found[2]), text)


def refuse_paths(value: Any) -> Any:
    """A validator of a text or of a dict's texts: ValueError where one holds an absolute path."""
    for text in value.values() if isinstance(value, dict) else [value]:
        if isinstance(text, str) and (found := _PATH.search(text)):
            raise ValueError(f"{found[2]!r} is a path of this machine; records hold base names only")
    return value


class Frozen(BaseModel):
    """A part of a record: unknown fields and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Hardware(Frozen):
    """What the numbers were measured on; `cores` are those this process may run on, memory is in GiB."""

    device: Literal["cpu", "cuda"]
    cpu: str
    cores: int
    memory_gib: float | None  # of older records None where the system did not say it
    gpu: str | None = None
    gpu_driver: str | None = None
    gpu_memory_gib: float | None = None


class Git(Frozen):
    """The commit of the checkout, and whether the tree differed from it (docs/ apart, where records are written)."""

    commit: str = Field(pattern="^[0-9a-f]{40,64}$")
    dirty: bool


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it, with base names for absolute paths and for the program."""
    return shlex.join([_base_name(argv[0]), *map(without_paths, argv[1:])])


def hardware_of(device: str) -> Hardware:
    """This machine as seen by this process; with "cuda" or "cuda:N" also that GPU."""
    from psutil import virtual_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _gib(virtual_memory().total)
    if device == "cpu":
        return Hardware(device="cpu", cpu=_cpu_name(), cores=cores, memory_gib=memory)
    import torch

    gpu = torch.cuda.get_device_properties(torch.device(device))
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Hardware(
        device="cuda",
        cpu=_cpu_name(),
        cores=cores,
        memory_gib=memory,
        gpu=gpu.name,
        gpu_driver=driver.split()[0] if driver else None,
        gpu_memory_gib=_gib(gpu.total_memory),
    )


def installed_versions() -> dict[str, str]:
    """Python's version, and those of the packages that matter to a latency, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_of(root: Path) -> Git | None:
    """The state of the checkout whose top folder is `root`; None if it is none, or lies in another's."""
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != root.resolve():
        return None
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":(exclude)docs")
    return Git(commit=commit, dirty=changes != "")


def surroundings(device: str) -> dict[str, Any]:
    """Hardware, versions and commit, as a record of free form keeps them."""
    git = git_of(Path(__file__).resolve().parents[1])
    return {
        "hardware": hardware_of(device).model_dump(),
        "versions": installed_versions(),
        "git": git.model_dump() if git else None,
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """As JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _base_name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    name = found[1].strip() if found else _output("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
