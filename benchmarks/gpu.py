"""The GPU path from a prompt to a picture on the host, beside diffusers: written after every row, the most telling first.

Weights are random, so nothing is downloaded. Every candidate's picture is compared with float32's before it is timed. Each row
is measured twice: a gain smaller than the two differ is none.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import ImagineFlashError
from ..core.images import psnr
from ..core.noise import initial_noise
from ..engine import Engine, GenerateRequest
from ..folders.reading import read_student_manifest
from .harness import Candidate, measure
from .kernels import bench_kernels, refuse_interpreter
from .random_students import Shape, random_student
from .records import save
from .schema import Case, Check, Record, new_record

EAGER = "diffusers, eager"
OURS = {
    "torch": "ours, eager",
    "torch-graph": "ours, captured with kernels",
    "torch-compile": "ours, compiled, captured",
}
ALSO: dict[str, dict[str, Any]] = {  # of torch-compile, in rows of their own, since each takes minutes to load
    "kernels tried out": {"autotune": True},
    "matrices in fp8": {"precision": "fp8"},
}
CASES = ((1, 1, "cached"), (1, 1, "new"), (1, 3, "cached"), (4, 1, "cached"), (16, 1, "cached"))  # batch, steps, prompt
LEAST_PSNR = 20.0  # dB to float32: random weights amplify what half precision rounds
PROMPTS = ("a red fox", "a cat on pink", "a boat on blue", "a house", "a star on red", "a blue cat", "a fox")


def bench_gpu(
    out: Path,
    *,
    device: str | None = None,
    minutes: float = 20.0,
    rounds: int = 50,
    tiny: bool = False,
    compile: bool = True,
    mode: str = "max-autotune",
) -> Record:
    """Measures pictures until the minutes are over, then kernels for a quarter of that; writes `out`.json and `out`.png after
    each row and the kernels' record beside it.
    tiny: small shapes, to try the whole of it on a CPU. compile: also what torch.compile makes, which takes minutes for each
    batch size, and in rows of their own with kernels tried out and in fp8, where it can; mode: its mode for diffusers, which
    the candidate's name says. Raises ImagineFlashError for a wrong picture."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not tiny:
        raise ImagineFlashError(
            "there is no GPU here; --tiny tries the benchmark on the CPU, where its numbers say nothing"
        )
    refuse_interpreter()
    end, rows, record = time.monotonic() + 60 * minutes, list[Case](), None
    for measured in _rows("tiny" if tiny else "sd-turbo", device, rounds, mode if compile else None):
        rows.append(measured)
        record = new_record("From a prompt to a picture on the host, beside diffusers?", rows, device=device)
        save(record, out)
        if time.monotonic() > end:
            break
    assert record is not None
    kernels = out.with_name(f"{out.name}-kernels")
    bench_kernels(kernels, device=device, rounds=rounds, quick=tiny, until=end + 15 * minutes)
    return record


def _rows(shape: Shape, device: str, rounds: int, mode: str | None) -> Iterator[Case]:
    for tiny_decoder in (True, False):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
            random_student(student := Path(folder) / "student", shape, tiny_decoder=tiny_decoder)
            models = Models(student, device, opened, mode)
            for case in _cases(ALSO if mode is not None and tiny_decoder else ()):
                try:
                    models.load(case)
                except (
                    ImagineFlashError
                ) as error:  # no GPU for it, a package that is missing, random weights that bear less
                    warnings.warn(f"no row with {case['also']}: {error}", stacklevel=2)
                    continue
                for again in (1, 2):
                    named = {"model": shape, "decoder": "tiny" if tiny_decoder else "KL", **case, "run": again}
                    yield models.measure(named, rounds)


def _cases(also: Collection[str]) -> list[dict[str, Any]]:
    """also: the first case once more beside each of these."""
    first, *others = ({"batch": batch, "steps": steps, "prompt": prompt} for batch, steps, prompt in CASES)
    return [first, *({**first, "also": each} for each in also), *others]


class Models:
    """Every way to draw one student, loaded once; mode: of torch.compile for diffusers, None leaves out what it makes."""

    def __init__(self, student: Path, device: str, opened: ExitStack, mode: str | None) -> None:
        self.student, self.device, self._opened = student, device, opened
        with Engine.load(student, backend="torch", device=device, precision="fp32", max_batch=16) as exact:
            self.expected = {steps: exact.generate(_request(PROMPTS[0], 1, steps)).images[0] for steps in (1, 3)}
        left_out = [*(["torch-graph"] if device == "cpu" else []), *([] if mode else ["torch-compile"])]
        names = {name: title for name, title in OURS.items() if name not in left_out}
        self.engines = {title: self._load(name) for name, title in names.items()}
        self.also = dict[str, Engine]()
        self.shape = next(iter(self.engines.values())).manifest.latent_shape
        plans = read_student_manifest(student).step_plans
        self.plans = {steps: list(plan.timesteps) for steps, plan in plans.items()}
        self.pipelines = {EAGER: _pipeline(student, device)}
        if mode:
            self.pipelines[f"diffusers, compiled ({mode})"] = _compiled(_pipeline(student, device), mode)

    def _load(self, backend: str, **options: Any) -> Engine:
        loaded = Engine.load(self.student, backend=backend, device=self.device, max_batch=16, **options)
        return self._opened.enter_context(loaded)

    def load(self, case: dict[str, Any]) -> None:
        """What this case is measured with beside the others. Raises ImagineFlashError where it cannot be had."""
        if (also := case.get("also")) is not None:
            self.also[also] = self._load("torch-compile", **ALSO[also])

    def measure(self, case: dict[str, Any], rounds: int) -> Case:
        """One row: all candidates in turn, by the host's clock, since each call ends with the picture on the host."""
        engines = {**self.engines}
        if (also := case.get("also")) is not None:
            engines[f"{OURS['torch-compile']}, {also}"] = self.also[also]
        steps, batch, fresh = case["steps"], case["batch"], case["prompt"] == "new"
        draws = {
            **{name: self._by_diffusers(name, steps, batch, fresh) for name in self.pipelines},
            **{name: self._by_engine(engine, steps, batch, fresh) for name, engine in engines.items()},
        }
        found: dict[str, float] = {}

        def check(candidate: Candidate) -> Check:
            found[candidate.name] = psnr(draws[candidate.name](PROMPTS[0])[0], self.expected[steps])
            return Check(
                what="PSNR to float32, below 100 dB", error=100 - found[candidate.name], tolerance=100 - LEAST_PSNR
            )

        words = itertools.cycle(PROMPTS)
        candidates = [
            Candidate(name=name, run=lambda draw=draw: draw(next(words) if fresh else PROMPTS[0]))
            for name, draw in draws.items()
        ]
        row = measure(candidates, baseline=EAGER, check=check, case=case, warm_up=3, n=rounds, repeats=1)
        return row.with_extra({name: {"PSNR to float32, dB": round(value, 1)} for name, value in found.items()})

    def _by_engine(self, engine: Engine, steps: int, batch: int, fresh: bool) -> Callable[[str], NDArray[np.uint8]]:
        def draw(prompt: str) -> NDArray[np.uint8]:
            if fresh:
                engine.prompt_cache.clear()
            return engine.generate(_request(prompt, batch, steps)).images

        return draw

    def _by_diffusers(self, name: str, steps: int, batch: int, fresh: bool) -> Callable[[str], NDArray[np.uint8]]:
        pipeline, plan, known = self.pipelines[name], self.plans[steps], dict[str, Any]()
        noise = torch.from_numpy(initial_noise(1, batch, self.shape))

        @torch.no_grad()
        def draw(prompt: str) -> NDArray[np.uint8]:
            if fresh or prompt not in known:
                known[prompt] = pipeline.encode_prompt(prompt, self.device, batch, False)[0]
            latents = noise.to(self.device, pipeline.unet.dtype)
            images = pipeline(
                prompt_embeds=known[prompt], timesteps=plan, guidance_scale=1.0, latents=latents, output_type="pt"
            ).images
            return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        return draw


def _request(prompt: str, count: int, steps: int) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, count=count, steps=steps, seed=1)


def _pipeline(student: Path, device: str) -> Any:
    from .diffusers_student import pipeline_of

    return pipeline_of(student).to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def _compiled(pipeline: Any, mode: str) -> Any:
    """As diffusers' documentation has it."""
    mode = "default" if pipeline.device.type == "cpu" else mode
    pipeline.unet = torch.compile(pipeline.unet.to(memory_format=torch.channels_last), mode=mode)
    pipeline.vae.decode = torch.compile(pipeline.vae.to(memory_format=torch.channels_last).decode, mode=mode)
    return pipeline
