"""Hashes, and atomic writes under exceptions and SIGKILL."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.folders import files
from imagine_flash.folders.files import atomic_file, atomic_folder, hash_files, hash_folder, sha256_file


@pytest.fixture
def old(tmp_path):
    """A folder that looks like an artifact."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    (folder / "graph.onnx").write_bytes(b"old" * 1000)
    return folder


def siblings(folder):
    return [path.name for path in folder.parent.iterdir() if path != folder]


def test_hashes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file.bin").write_bytes(b"content")
        (tmp_path / name / "manifest.json").write_text("{}")
    assert sha256_file(tmp_path / "a/deep/file.bin") == hashlib.sha256(b"content").hexdigest()
    assert list(hash_files(tmp_path / "a")) == ["deep/file.bin"]
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")
    (tmp_path / "b/deep/file.bin").rename(tmp_path / "b/deep/other.bin")
    assert hash_folder(tmp_path / "a") != hash_folder(tmp_path / "b")


def test_the_hash_of_a_large_file_outlives_the_process_and_no_change(tmp_path, monkeypatch):
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 4)
    monkeypatch.setattr(files, "SETTLED_NS", -1)
    hashed, really = [], files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path) or really(path))

    def in_another_process():
        files._sha256_of.cache_clear()
        return files.known_sha256(large)

    large = tmp_path / "weights.bin"
    large.write_bytes(b"12345")
    assert in_another_process() == in_another_process() == really(large) and len(hashed) == 1
    there = large.stat()
    large.write_bytes(b"54321")  # of the same size, and its date put back
    os.utime(large, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert in_another_process() == really(large) and len(hashed) == 2
    for note in (tmp_path / "cache/hashes").iterdir():
        note.write_text("damaged")
    assert in_another_process() == really(large) and len(hashed) == 3
    monkeypatch.setattr(files, "SETTLED_NS", 10**12)
    large.write_bytes(b"again")  # only just written: not trusted yet
    assert in_another_process() == in_another_process() == really(large) and len(hashed) == 5


def test_a_new_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "nested").mkdir()
        (folder / "nested/file").write_text("new")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
        assert folder.name.startswith(".out.tmp-")
    assert (tmp_path / "out/nested/file").read_text() == "new"
    assert siblings(tmp_path / "out") == []


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("marker", ["manifest.json", "imagine_flash.json", None])
def test_an_old_artifact_student_or_empty_folder_is_replaced(tmp_path, marker, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    target.mkdir()
    if marker:
        (target / marker).write_text("old")
    with atomic_folder(target) as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert siblings(target) == []


def test_an_exception_leaves_the_old_artifact_whole(old):
    before = hash_folder(old)
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(old) as folder:
        (folder / "graph.onnx").write_bytes(b"new")
        raise RuntimeError("half way")
    assert hash_folder(old) == before
    assert siblings(old) == []


def test_folders_of_others_are_refused_before_work_starts(tmp_path, old):
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "holiday.jpg").write_text("irreplaceable")
    started = []
    for target, message in [
        (precious, "refusing to replace"),
        (old / "manifest.json", "it is a file; choose another name"),
        (tmp_path / "missing" / "out", "does not exist; create it first"),
        (old / "graph.onnx" / "out", "cannot write"),
    ]:
        with pytest.raises(ArtifactError, match=message), atomic_folder(target):
            started.append(target)
    assert started == []
    assert (precious / "holiday.jpg").read_text() == "irreplaceable"
    with atomic_folder(precious, replaces=("holiday.jpg",)) as folder:
        (folder / "new").touch()
    assert not (precious / "holiday.jpg").exists()


def test_a_read_only_place_is_one_line():
    with pytest.raises(ArtifactError, match=r"cannot write /proc/out: "), atomic_folder("/proc/out"):
        pass
    with pytest.raises(ArtifactError, match=r"cannot write /proc/out\.png"), atomic_file("/proc/out.png"):
        pass


def test_a_link_keeps_pointing_to_the_new_folder(old, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(old)
    with atomic_folder(link) as folder:
        (folder / "file").write_text("new")
    assert link.is_symlink()
    assert (old / "file").read_text() == "new"


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_what_links_lead_to_keeps_its_mode(tmp_path, link):
    """It happened that a student of links gave away weights that their owner alone could read, and that weights of another user
    could not be linked at all."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"mine")
    weights.chmod(0o400)
    with atomic_folder(tmp_path / "student") as folder:
        link(weights, folder / "weights.safetensors")
        (folder / "imagine_flash.json").touch(0o600)
    assert weights.stat().st_mode & 0o777 == 0o400
    assert (tmp_path / "student/imagine_flash.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    os.umask(now := os.umask(0o022))
    return now


def test_a_link_that_leads_nowhere_is_no_reason_to_fail(tmp_path):
    with atomic_folder(tmp_path / "student") as folder:
        (folder / "weights").symlink_to(tmp_path / "nowhere")
    assert (tmp_path / "student/weights").is_symlink()


def test_atomic_file(tmp_path):
    target = tmp_path / "picture.png"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_file(target) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert siblings(target) == []
    for wrong, message in [(tmp_path, "it is a folder"), (tmp_path / "gone/x.png", "does not exist; create it first")]:
        with pytest.raises(ArtifactError, match=message), atomic_file(wrong):
            pass


WRITE_HALF = """
import sys, time
from imagine_flash.folders.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "manifest.json").write_text("new")
    print("half", flush=True)
    time.sleep(60)
"""

WRITE_FOREVER = """
import sys
from imagine_flash.folders.files import atomic_folder
print("started", flush=True)
for version in range(1_000_000):
    with atomic_folder(sys.argv[1]) as folder:
        for name in ("manifest.json", "graph.onnx"):
            (folder / name).write_text(str(version))
"""


def killed(program, target, seconds):
    process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_sigkill_half_way_leaves_the_old_artifact_whole(old):
    before = hash_folder(old)
    killed(WRITE_HALF, old, 0)
    assert hash_folder(old) == before
    assert len(siblings(old)) == 1  # what the dead process had begun, under a name of its own


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange of two folders in one call is Linux's")
def test_sigkill_at_any_moment_leaves_one_version_whole(old):
    for name in ("manifest.json", "graph.onnx"):
        (old / name).write_text("old")
    for attempt in range(6):
        killed(WRITE_FOREVER, old, 0.05 + 0.013 * attempt)
        assert (old / "manifest.json").read_text() == (old / "graph.onnx").read_text()
