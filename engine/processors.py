"""How many processor threads this process may use: not more than it is given, or they wait for one another."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def processors() -> int:
    """At least 1: what affinity, the quota of a container (cgroups, version 1 and 2) and OMP_NUM_THREADS leave, the least."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    omp = int(wanted) if wanted.isdecimal() and int(wanted) else here
    return max(1, min(here, omp, int(_quota())))


def _quota() -> float:
    """Processors, as the tightest of the groups that this process is in allows; infinite where none does."""
    least = float("inf")
    for folder in _groups():
        try:
            if (folder / "cpu.max").is_file():
                given, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                given, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
                )
            if given not in ("max", "-1"):
                least = min(least, int(given) / int(period))
        except (OSError, ValueError):  # no such group, or not for us to read
            continue
    return least if least < 1e6 else 1e6


def _groups() -> list[Path]:
    """Folders of this process's group and those above it."""
    try:
        lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "" or "cpu" in controllers.split(","):
            root = CGROUPS if controllers == "" else CGROUPS / controllers
            own = root / path.strip("/")
            found += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return found
