"""The command that measures the export of large models; what it writes is looked at where a record is made."""

import subprocess
import sys

import pytest

pytest.importorskip("psutil")
MODULE = "imagine_flash.benchmarks.full_size.export"


def test_a_wrong_kind_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", MODULE, "sd"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("give one of tiny, sd15, sd-turbo"), done.stderr
