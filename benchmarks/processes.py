"""What only a process of its own can show of the runtime: how soon the first picture is there, and the memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ImagineFlashError
from ..engine import Engine, GenerateRequest
from ..folders.files import CACHE_VARIABLE
from ..folders.manifests import ArtifactManifest
from . import diffusers_student
from .harness import Candidate, measure
from .pictures import Limits, check_pictures, different_requests, drawn_by_torch, limits_of, precision_of, read_picture
from .schema import Case, Check

COMMAND = (sys.executable, "-m", "imagine_flash")
CALL = "import json, sys; from imagine_flash.benchmarks.{module} import {name}; {name}(**json.loads(sys.argv[1]))"
NOT_CACHED = ", nothing cached"
MB, SETTLED = 1e6, 200  # requests until memory is what it stays


def cold_start(
    folder: Path, manifest: ArtifactManifest, backends: Sequence[str], rounds: int, student: Path | None
) -> Case:
    """From a process's start to its end, the picture in a file: `imagine-flash generate`, and diffusers' pipeline.

    OpenVINO keeps compiled models from one process to the next; "nothing cached" is it without them.
    """
    steps, (request, expected) = max(drawn_by_torch(folder, manifest).items())
    limits: dict[str, Limits] = {}
    commands: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory(prefix="imagine-flash-cold-start-") as scratch:
        out = Path(scratch) / "picture.png"
        if student is not None:
            arguments = diffusers_student.picture_of(request, manifest) | {"student": str(student), "output": str(out)}
            commands[diffusers_student.NAME] = lambda: _call("diffusers_student", "draw_to_file", arguments)
        for name in backends:
            with Engine.load(folder, backend=name) as engine:
                limits[name] = limits_of(manifest, precision_of(engine))
            command = [*COMMAND, "generate", request.prompt, "--backend", name, "--model", str(folder), "-o", str(out)]
            command += ["--steps", str(steps), "--seed", str(request.seed)]
            commands[name] = lambda command=command: _run(command)
            if name == "openvino":
                commands[name + NOT_CACHED] = lambda command=command: _run(command, **{CACHE_VARIABLE: ""})

        def check(candidate: Candidate) -> Check:
            out.unlink(missing_ok=True)
            candidate.run()
            allowed = limits.get(candidate.name) or limits_of(manifest, manifest.precision)
            return check_pictures(read_picture(out), expected, allowed)

        candidates = [Candidate(name=name, run=run) for name, run in commands.items()]
        about: dict[str, Any] = {"what": "cold start", "steps": steps}
        once: dict[str, Any] = {"warm_up": 1, "repeats": 1}
        return measure(candidates, baseline=candidates[0].name, check=check, case=about, n=rounds, **once)


def memory(folder: Path, manifest: ArtifactManifest, backends: Sequence[str], rounds: int, requests: int) -> Case:
    """Processes that load a backend, make every graph and batch ready and draw once; resident memory in between.

    "MB grown" is of one more process: by how much it is larger after `requests` more.
    """
    steps, (request, expected) = min(drawn_by_torch(folder, manifest).items())
    limits: dict[str, Limits] = {}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in backends}
    with tempfile.TemporaryDirectory(prefix="imagine-flash-memory-") as scratch:
        out = Path(scratch) / "picture.npy"

        def run(name: str, requests: int = 0) -> dict[str, float]:
            arguments = {"folder": str(folder), "backend": name, "output": str(out), "requests": requests}
            arguments |= {"prompt": request.prompt, "steps": steps, "seed": request.seed}
            found = json.loads(_call("processes", "report_memory", arguments))
            limits[name] = limits_of(manifest, found.pop("precision"))
            seen[name].append(found)
            return found

        def check(candidate: Candidate) -> Check:
            out.unlink(missing_ok=True)
            candidate.run()
            return check_pictures(np.load(out), expected, limits[candidate.name])

        candidates = [Candidate(name=name, run=lambda name=name: run(name)) for name in backends]
        about: dict[str, Any] = {"what": "load and warm up", "requests": requests}
        once: dict[str, Any] = {"warm_up": 1, "repeats": 1}
        case = measure(candidates, baseline=backends[0], check=check, case=about, n=rounds, **once)
        extra: dict[str, dict[str, float]] = {}
        for name in backends:
            middle = {key: round(float(np.median([found[key] for found in seen[name]])), 1) for key in seen[name][0]}
            extra[name] = middle | {"MB grown": round(run(name, requests)["MB grown"], 1)}
    return case.with_extra(extra)


def resident_mb(pid: int | None = None) -> float:
    """A process's resident memory, by default this one's, in 10^6 bytes."""
    from psutil import Process

    return Process(pid).memory_info().rss / MB


def own_mb(pid: int) -> float:
    """Of a process's resident memory what is no page of a file, in 10^6 bytes: pages of files come and go as the system likes."""
    from psutil import Process

    info = Process(pid).memory_info()
    return (info.rss - getattr(info, "shared", 0)) / MB


def grown_mb(engine: Engine, requests: int, steps: int) -> float:
    """By how much this process is larger after so many requests, most of them in groups, than it is after 200."""
    different = different_requests(engine.artifact, 16, steps)

    def draw(count: int) -> None:
        for first in range(0, count, engine.max_batch):
            group = range(first, min(first + engine.max_batch, count))
            wanted = [different[i % len(different)].model_copy(update={"seed": i}) for i in group]
            for future in [engine.submit(request) for request in wanted]:
                future.result()

    draw(SETTLED)
    before = resident_mb()
    draw(requests)
    return resident_mb() - before


def report_memory(folder: str, backend: str, prompt: str, steps: int, seed: int, output: str, requests: int) -> None:
    """In a process of its own: prints memory as JSON, and writes the picture as .npy."""
    before = resident_mb()
    with Engine.load(folder, backend=backend) as engine:
        loaded = resident_mb()
        engine.warm_up()
        pixels = engine.generate(GenerateRequest(prompt=prompt, steps=steps, seed=seed)).images[0]
        found = {"MB before": before, "MB loaded": loaded, "MB warm": resident_mb()}
        if requests:
            found["MB grown"] = grown_mb(engine, requests, steps)
        np.save(output, pixels)
        print(json.dumps({**found, "precision": precision_of(engine)}))


def _call(module: str, name: str, arguments: dict[str, Any]) -> str:
    """What a function of this package prints in a process of its own."""
    return _run([sys.executable, "-c", CALL.format(module=module, name=name), json.dumps(arguments)])


def _run(command: Sequence[str], **environment: str) -> str:
    """What a command prints. Raises ImagineFlashError: the last line of its errors."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ImagineFlashError(f"a process to measure ended with {done.returncode}: {last}")
    return done.stdout
