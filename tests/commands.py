"""`imagine-flash` as a user types it, and the browser that opens its pages."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported its libraries already: output, errors, exit code."""
    from imagine_flash.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["imagine-flash", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(list(map(str, arguments)), int(ended.value.code or 0), *said)


def start(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "imagine_flash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, **options)


def fails(*arguments: str | Path) -> str:
    """The one line of a command that a user got wrong."""
    done = run(*arguments)
    assert done.returncode == 2, done
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    return line
