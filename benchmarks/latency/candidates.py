"""What is measured: this project's backends, and what people would use instead, each with what it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import ImagineFlashError, nearest
from ...folders.files import atomic_file

WORKER = Path(__file__).with_name("worker.py")
PACKAGE = Path(__file__).resolve().parents[2]
FLOAT = {"dtype": "float32", "channels_last": False, "compile": False}
TUNED = {"dtype": "bfloat16", "channels_last": True, "compile": False}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to draw. told: what its process is told. exact: float32, so its picture must be nearly the reference's.
    python: the environment's interpreter. converted: the format that its library converts the student to."""

    name: str
    told: Mapping[str, Any]
    exact: bool
    python: str = sys.executable
    converted: Literal["onnx", "openvino"] | None = None


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Ways of one library, the documented one first. modules: what must be importable; pip: what installs them."""

    modules: tuple[str, ...]
    pip: str
    ways: tuple[Candidate, ...]


def _way(name: str, kind: str, *, exact: bool = False, converted: Any = None, **told: Any) -> Candidate:
    return Candidate(name=name, told={"candidate": kind, "dtype": "float32", **told}, exact=exact, converted=converted)


TORCH = ("torch", "diffusers", "transformers")
BASELINES: dict[str, Baseline] = {
    "diffusers": Baseline(
        modules=TORCH,
        pip="imagine-flash[bench]",
        ways=(
            _way("diffusers fp32", "diffusers", exact=True, **FLOAT),
            _way("diffusers bf16 channels_last", "diffusers", **TUNED),
        ),
    ),
    "diffusers-compile": Baseline(
        modules=TORCH,
        pip="imagine-flash[bench]",
        ways=(_way("diffusers bf16 compiled", "diffusers", **{**TUNED, "compile": True}),),
    ),
    "optimum-onnx": Baseline(
        modules=("optimum.onnxruntime", "diffusers"),
        pip="optimum-onnx[onnxruntime] diffusers pydantic",
        ways=(_way("optimum-onnx", "optimum-onnx", exact=True, converted="onnx"),),
    ),
    "optimum-intel": Baseline(
        modules=("optimum.intel", "diffusers", "openvino"),
        pip="optimum-intel[openvino] diffusers pydantic",
        ways=(
            _way("optimum-intel", "optimum-intel", converted="openvino", static=False),
            _way("optimum-intel static", "optimum-intel", converted="openvino", static=True),
        ),
    ),
    "openvino-genai": Baseline(
        modules=("openvino_genai",),
        pip="openvino-genai",
        ways=(
            _way("openvino-genai", "openvino-genai", converted="openvino", static=False),
            _way("openvino-genai static", "openvino-genai", converted="openvino", static=True),
        ),
    ),
}


def ours(names: Sequence[str]) -> list[Candidate]:
    """Of backends as NAME or NAME:PRECISION, such as openvino:fp32; the first is what others are compared with."""
    found = []
    for name in dict.fromkeys(names):
        backend, _, precision = name.partition(":")
        told = {"candidate": "engine", "backend": backend, "precision": precision or "auto"}
        found.append(Candidate(name=f"imagine-flash {name}", told=told, exact=precision == "fp32"))
    return found


def chosen(names: Sequence[str], pythons: Mapping[str, str]) -> tuple[list[Candidate], dict[str, str]]:
    """The ways of the baselines asked for, and of those that are not installed why. pythons: baseline -> interpreter of an
    environment of its own. Raises ImagineFlashError for an unknown name."""
    ways: list[Candidate] = []
    left_out: dict[str, str] = {}
    for name in dict.fromkeys([*names, *pythons]):
        if name not in BASELINES:
            raise ImagineFlashError(f"no baseline {name!r}{nearest(name, BASELINES)}; known: {', '.join(BASELINES)}")
    for name in dict.fromkeys(names):
        baseline, python = BASELINES[name], pythons.get(name, sys.executable)
        if missing := _missing(python, baseline.modules):
            left_out[name] = f'{missing} is not installed: pip install "{baseline.pip}"'
            continue
        ways += [Candidate(**{**vars(way), "python": python}) for way in baseline.ways]
    return ways, left_out


def pythons_of(given: Sequence[str]) -> dict[str, str]:
    """baseline -> interpreter, of NAME=FILE. Raises ImagineFlashError."""
    found = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or not file:
            raise ImagineFlashError(f"--python takes NAME=FILE, such as optimum-intel=other/bin/python; got {text!r}")
        found[name] = file
    return found


def _missing(python: str, modules: Sequence[str]) -> str | None:
    """The first module that this interpreter does not find. Raises ImagineFlashError where there is no interpreter."""
    look = "import importlib.util as u, sys\nfor m in sys.argv[1:]:\n try: f = u.find_spec(m)\n except ImportError: f = None\n"
    look += " if f is None: print(m); break"
    try:
        done = subprocess.run([python, "-c", look, *modules], capture_output=True, text=True)
    except OSError as error:
        raise ImagineFlashError(f"cannot run the Python {python}: {error.strerror}") from None
    return done.stdout.strip() or (None if done.returncode == 0 else modules[0])


class CandidateError(ImagineFlashError):
    """What one candidate cannot do."""

    def __init__(self, candidate: Candidate, reason: str) -> None:
        super().__init__(f"{candidate.name}: {reason}")
        self.candidate = candidate


class Worker:
    """A candidate's process, once it has loaded. started: the seconds from its start until it could draw. about: what it says of
    itself. numbers: further ones that were seen of it.

    Raises CandidateError with the reason where it cannot load or draw.
    """

    def __init__(
        self, candidate: Candidate, told: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        self.candidate, started = candidate, time.perf_counter()
        arguments = json.dumps({"package": str(PACKAGE), **told, **candidate.told})
        self._process = subprocess.Popen(
            [candidate.python, "-P", str(WORKER), arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is for the one who asked
        )
        self.pid = self._process.pid
        self.about: str = self._answer()["about"]
        self.name = f"imagine-flash {self.about}" if self.about else candidate.name
        self.started = time.perf_counter() - started
        self.numbers: dict[str, float] = {}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def draw(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What `worker.py` says of one call: seconds, stages, memory."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it ended: the answer says so
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = json.loads(line) if line else {"error": f"its process ended with {self._process.wait()}"}
        if "error" in found:
            self._process.kill()
            raise CandidateError(self.candidate, found["error"])
        return found


def convert(candidate: Candidate, student: Path, folder: Path) -> Path:
    """The student in the format of the candidate's library, made once a folder. Raises ImagineFlashError."""
    assert candidate.converted is not None
    folder.mkdir(parents=True, exist_ok=True)
    target, log = folder / f"optimum-{candidate.converted}", folder / f"optimum-{candidate.converted}.log"
    done = target / "converted"
    if not done.is_file():
        told = {"candidate": "convert", "student": str(student), "converted": str(target)}
        told |= {"format": candidate.converted}
        with log.open("w", encoding="utf-8") as written:
            command = [candidate.python, "-P", str(WORKER), json.dumps(told)]
            ended = subprocess.run(command, stdout=written, stderr=written)
        if ended.returncode:
            last = (
                [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] or ["it said nothing"]
            )[-1]
            raise CandidateError(candidate, f"optimum cannot convert the student: {last[:160]}")
        with atomic_file(done) as temporary:
            temporary.touch()
    return target
