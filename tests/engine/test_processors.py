"""Threads: no more than affinity, a container's quota and OMP_NUM_THREADS leave."""

from pathlib import Path

import pytest

from imagine_flash.engine import processors

HERE = 8


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(HERE)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: HERE)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_any_limit_all_there_are(cgroups: Path) -> None:
    assert processors.processors() == HERE


def test_a_containers_quota(cgroups: Path) -> None:
    """Eight threads on a quota of 2.5 processors were stopped for most of each tenth of a second."""
    write(cgroups / "own", "0::/\n")
    write(cgroups / "cgroup/cpu.max", "250000 100000\n")
    assert processors.processors() == 2
    write(cgroups / "cgroup/cpu.max", "50000 100000\n")
    assert processors.processors() == 1
    write(cgroups / "cgroup/cpu.max", "max 100000\n")
    assert processors.processors() == HERE


def test_the_tightest_of_the_groups_above_counts(cgroups: Path) -> None:
    write(cgroups / "own", "0::/system.slice/flash.service\n")
    write(cgroups / "cgroup/system.slice/cpu.max", "300000 100000\n")
    write(cgroups / "cgroup/system.slice/flash.service/cpu.max", "max 100000\n")
    assert processors.processors() == 3


def test_the_first_version_of_cgroups(cgroups: Path) -> None:
    write(cgroups / "own", "4:memory:/x\n3:cpu,cpuacct:/docker/1\n0::/\n")
    write(cgroups / "cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us", "400000\n")
    write(cgroups / "cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us", "100000\n")
    assert processors.processors() == 4


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("3,1", 3), ("99", HERE), ("0", HERE), ("many", HERE)])
def test_omp_num_threads(cgroups: Path, monkeypatch: pytest.MonkeyPatch, given: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert processors.processors() == threads
