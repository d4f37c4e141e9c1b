"""Every snippet of the README and the docs runs: Python in one scope a page, commands as they stand there."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ARTIFACT = ROOT / "assets/emoji/artifact"
PAGES = {
    str(path.relative_to(ROOT)).replace("\\", "/"): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.name != "cli.md"  # generated
}
FENCE = re.compile(
    r"(?:<!-- (?P<note>[^>]*) -->\n)?^```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    kind: str  # python, console, yaml, text
    body: str
    note: str = ""  # the comment above it: "not run: why", "with a server", "while a server loads"
    title: str = ""  # the file that a reader saves it as

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run: ")


def blocks(page: str, *kinds: str) -> list[Block]:
    found = [Block(**{k: v or "" for k, v in match.groupdict().items()}) for match in FENCE.finditer(PAGES[page])]
    return [block for block in found if not kinds or block.kind in kinds]


def commands(page: str) -> list[tuple[Block, list[str]]]:
    """The words of each line that a reader types, with the block that it is in."""
    found = []
    for block in blocks(page, "console"):
        lines = [line.removeprefix("$ ") for line in block.body.splitlines() if line.startswith("$ ")]
        assert lines, f"{page}: a console block without a line that begins with $"
        found += [(block, shlex.split(line)) for line in lines]
    return found


def indented(page: str) -> list[list[str]]:
    """The words of each `imagine-flash` in a block that is indented instead of fenced."""
    text = FENCE.sub("", PAGES[page])
    return [
        shlex.split(line, comments=True) for line in re.findall(r"^    (?:.* && |\$ )?(imagine-flash .*)$", text, re.M)
    ]


PYTHON = [page for page in PAGES if any(b.runs and not b.note for b in blocks(page, "python"))]
SERVED = [page for page in PAGES if any(b.note == "with a server" for b in blocks(page, "python"))]
TYPED = [page for page in PAGES if any(b.runs and words[0] == "imagine-flash" for b, words in commands(page))]
SLOWEST = "docs/tutorials/small-model.md"  # from a teacher to pictures, as test_distil_your_own does
RARELY = (SLOWEST, "docs/export.md")  # whose commands the tests of the exporter give too, one by one


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_student: Path) -> Path:
    """The folder that a reader works in: what the pages take for granted is there."""
    shutil.copytree(ARTIFACT, tmp_path / "runs/artifact")  # no link: a page may export to it
    for name in ("student", "my-student", "my-model", "runs/student"):
        shutil.copytree(tiny_student, tmp_path / name)
    (tmp_path / "my-model/imagine_flash.json").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(page: str, scope: dict[str, Any], *notes: str, change: tuple[str, str] = ("", "")) -> None:
    for block in blocks(page, "python"):
        code = compile(block.body.replace(*change), page, "exec")  # also what is not run
        if block.runs and block.note in notes:
            exec(code, scope)


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow if p == "docs/diffusers.md" else ()) for p in PYTHON]
)
def test_python(page: str, desk: Path) -> None:
    scope: dict[str, Any] = {"__name__": page}
    execute(page, scope, "")
    result = scope.get("result")
    assert result is None or (result.images.dtype == "uint8" and result.images.std() > 10)


def test_what_tritons_client_is_told_to_send_draws_the_engines_picture(desk: Path) -> None:
    """The inputs of docs/scaling.md go to the graph that Triton would run."""
    import numpy as np
    import onnxruntime

    from imagine_flash.engine import Engine, GenerateRequest

    scope: dict[str, Any] = {}
    execute("docs/scaling.md", scope, "")
    session = onnxruntime.InferenceSession(ARTIFACT / "sampler_3.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.run(["images"], scope["inputs"])
    with Engine.load(ARTIFACT, backend="onnxruntime") as engine:
        expected = engine.generate(GenerateRequest(prompt="a fox on a pink background", seed=7, steps=3)).images
    assert np.abs(np.asarray(images).astype(int) - expected).max() <= 1


def test_a_manifest_made_by_hand_is_one(desk: Path) -> None:
    from imagine_flash.folders.reading import read_student_manifest

    execute("docs/how-to/distil-your-own.md", {}, "")
    assert sorted(read_student_manifest(desk / "my-model").plans) == [1, 2]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) or indented(page)])
def test_commands_parse(page: str) -> None:
    """Each `imagine-flash` that a page tells to type has a command and options that there are."""
    from typer.main import get_command

    from imagine_flash.cli import app

    for words in [*(words for _, words in commands(page)), *indented(page)]:
        if words[0] != "imagine-flash":
            continue
        command, given = get_command(app), words[1:]
        while given and hasattr(command, "commands") and given[0] in command.commands:  # type: ignore[attr-defined]
            command, given = command.commands[given[0]], given[1:]  # type: ignore[attr-defined]
        assert not hasattr(command, "commands"), f"{page}: no command {' '.join(words)}"
        command.make_context(words[1], given)  # raises for what it does not know


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.title.endswith("yaml") for b in blocks(page))])
def test_recipes_and_settings_are_read(page: str, tmp_path: Path) -> None:
    from imagine_flash.distill.methods import load_distill_recipe
    from imagine_flash.distill.recipe import TeacherRecipe, load_recipe
    from imagine_flash.engine.server.settings import read_settings

    for block in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(block.body, encoding="utf-8")
        if block.title == "settings.yaml":
            read_settings(tmp_path / "recipe.yaml", {})
        elif "autoencoder:" in block.body:
            load_recipe(tmp_path / "recipe.yaml", TeacherRecipe)
        else:
            load_distill_recipe(tmp_path / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.weekly] * (p in RARELY)) for p in TYPED])
def test_commands_run(page: str, desk: Path) -> None:
    """All of a page in turn, with the files that it tells to save; servers and installations excepted."""
    for block in blocks(page):
        if block.title:
            (desk / block.title).write_text(block.body, encoding="utf-8")
    if page == SLOWEST:  # it makes its own
        shutil.rmtree(desk / "runs")
    for block, words in commands(page):
        if block.runs and words[:2] != ["imagine-flash", "serve"] and words[0] == "imagine-flash":
            command = [sys.executable, "-m", "imagine_flash", *words[1:]]
            done = subprocess.run(command, capture_output=True, text=True, env=_environment())
            assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _wait_for(url: str) -> None:
    """Until it answers with 200."""
    import httpx

    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.05)


@pytest.fixture
def port(desk: Path) -> Iterator[int]:
    """Of `imagine-flash serve`, which loads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    command = [sys.executable, "-m", "imagine_flash", "serve", "--quiet", "--port", str(free)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
    _wait_for(f"http://127.0.0.1:{free}/healthz")
    yield free
    process.terminate()
    process.wait(30)


def test_trying_again_waits_for_a_server_and_no_longer_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gave up where nobody listened yet, and slept for five minutes where a quota said so."""
    import httpx

    def answer(status: int, after: str = "") -> httpx.Response:
        body, request = {"data": [{"b64_json": "a picture"}]}, httpx.Request("POST", "http://127.0.0.1")
        return httpx.Response(status, json=body, headers={"retry-after": after} if after else {}, request=request)

    def post(*_: Any, **__: Any) -> httpx.Response:
        if (found := next(answers)) is None:
            raise httpx.ConnectError("nobody listens")
        return found

    naps: list[float] = []
    answers = iter([None, answer(503), answer(429, "3"), answer(200), answer(429, "316"), None])
    monkeypatch.setattr(httpx, "post", post)
    monkeypatch.setattr(time, "sleep", naps.append)
    scope: dict[str, Any] = {}
    execute("docs/serving.md", scope, "while a server loads")
    assert scope["picture"] == "a picture" and naps == [1, 1, 3]
    with pytest.raises(httpx.HTTPStatusError):
        scope["draw"]("a fox")
    with pytest.raises(httpx.ConnectError):
        scope["draw"]("a fox", seconds=0.5)
    assert len(naps) == 3


@pytest.mark.slow
@pytest.mark.parametrize("page", SERVED)
def test_python_with_a_server(page: str, port: int) -> None:
    pytest.importorskip("openai")
    change = (":8000", f":{port}")
    execute(page, {"__name__": page}, "while a server loads", change=change)
    _wait_for(f"http://127.0.0.1:{port}/readyz")
    execute(page, {"__name__": page}, "with a server", change=change)
    assert Path("fox.png").read_bytes().startswith(b"\x89PNG")
