"""What commands say, and their exit codes, where output has no place to go, is not wanted or is cut short."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from imagine_flash.tests.commands import run


def test_an_interrupt_that_a_library_made_its_own_error_of_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime, interrupted while it was imported, raised an ImportError; so would what says that a package is missing."""
    from imagine_flash.core.errors import missing_extra
    from imagine_flash.engine import Engine

    for wrapped in (ImportError("initialization failed"), missing_extra("onnxruntime", "cpu")):

        def load(*_: object, error: Exception = wrapped, **__: object) -> None:
            raise error from KeyboardInterrupt()

        monkeypatch.setattr(Engine, "load", load)
        done = run("generate", "a cat")
        assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(
    "command", [["models"], ["generate", "a cat", "-o", "-"], ["generate", "a cat", "-o", "cat.png"]]
)
def test_results_that_cannot_be_written_are_one_line(command: list[str], tmp_path: Path) -> None:
    """Also as Python ends, which tries once more to write what is left."""
    with open("/dev/full", "wb") as full:
        asked = [sys.executable, "-m", "imagine_flash", *command]
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    said = done.stderr.strip().splitlines()
    assert (
        done.returncode == 2 and said[-1] == "error: cannot write a result: no space left on device; send it elsewhere"
    )
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_a_picture_for_a_standard_output_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from imagine_flash.cli import main

    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["imagine-flash", "generate", "a cat", "-o", "-"])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "-o - writes to standard output, which is closed; name a file" in said.getvalue()


def test_a_quiet_server_logs_no_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It logged each, though -q leaves nothing but results and errors."""
    from imagine_flash.cli import serve

    levels: list[str] = []
    monkeypatch.setattr(serve, "_serve_here", lambda settings: levels.append(settings.log_level))
    settings = tmp_path / "settings.yaml"
    settings.write_text("log-level: error\n")
    for options in ([], ["-q"], ["-q", "--log-level", "info"], ["-q", "--config", settings]):
        assert run("serve", *options).returncode == 0
    assert levels == ["info", "warning", "info", "error"]
