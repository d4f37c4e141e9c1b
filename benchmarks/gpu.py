"""The GPU path from a prompt to a picture on the host, beside diffusers: written after every row, the most telling first.

Weights are random, so nothing is downloaded. Every candidate's picture is compared with float32's before it is timed; one that
cannot be loaded or draws another picture is left out, and the record says why. Each row is measured twice: a gain smaller than
the two differ is none.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from ..core.errors import ImagineFlashError
from ..core.images import psnr
from ..core.noise import initial_noise
from ..engine import Engine, GenerateRequest
from ..folders.reading import read_student_manifest
from .harness import Candidate, measure
from .kernels import bench_kernels, refuse_interpreter
from .random_students import Shape, random_student
from .records import as_line, save
from .schema import Case, Check, Record, new_record

EAGER, COMPILED = "diffusers, eager", "torch-compile"
OURS = {"torch": "ours, eager", "torch-graph": "ours, captured with kernels", COMPILED: "ours, compiled, captured"}
TUNED: dict[str, dict[str, Any]] = {  # of torch-compile; each takes minutes to load
    "kernels tried out": {"autotune": True},
    "matrices in fp8": {"precision": "fp8"},
}
LEAST_PSNR = 20.0  # dB to float32: random weights amplify what half precision rounds
PROMPTS = ("a red fox", "a cat on pink", "a boat on blue", "a house", "a star on red", "a blue cat", "a fox")


@dataclass(frozen=True)
class Row:
    """What is measured, and what is measured in it beside the candidates of every row: "compiled", or one of TUNED."""

    batch: int = 1
    steps: int = 1
    prompt: str = "cached"
    decoder: str = "tiny"
    also: str = ""


# The most telling first; what compiles takes minutes for each batch size and is the likeliest to fail, so it comes last
PLAIN = (Row(), Row(decoder="KL"), Row(prompt="new"), Row(steps=3), Row(batch=4), Row(batch=16))
COMPILING = (
    Row(also="compiled"),
    Row(prompt="new", also="compiled"),
    Row(steps=3, also="compiled"),
    Row(decoder="KL", also="compiled"),
    *(Row(also=tuned) for tuned in TUNED),
    Row(batch=4, also="compiled"),
)


def bench_gpu(
    out: Path,
    *,
    device: str | None = None,
    minutes: float = 20.0,
    rounds: int = 50,
    tiny: bool = False,
    compile: bool = True,
    mode: str = "max-autotune",
    console: Console | None = None,
) -> Record:
    """Measures pictures, then kernels for at most a quarter of the minutes, then pictures with what torch.compile makes, until
    the minutes are over; writes `out`.json and `out`.png after each row and the kernels' record beside it.
    tiny: small shapes, to try the whole of it on a CPU. compile: also what compiles; mode: of torch.compile for diffusers, which
    the candidate's name says. console: for a line of each row, by default standard error.
    Raises ImagineFlashError at the end where this project drew a wrong picture."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not tiny:
        raise ImagineFlashError(
            "there is no GPU here; --tiny tries the benchmark on the CPU, where its numbers say nothing"
        )
    refuse_interpreter()
    console = console or Console(stderr=True)
    end, measured = time.monotonic() + 60 * minutes, list[Case]()
    with Pictures("tiny" if tiny else "sd-turbo", device, mode) as pictures:

        def measure_all(rows: tuple[Row, ...]) -> None:
            for case in pictures.rows(rows, rounds, end):
                measured.append(case)
                save(pictures.record(measured), out)
                console.print(as_line(case), markup=False, soft_wrap=True)

        measure_all(PLAIN)
        until = min(end, time.monotonic() + 15 * minutes)
        kernels = out.with_name(f"{out.name}-kernels")
        bench_kernels(kernels, device=device, rounds=rounds, quick=tiny, until=until, console=console)
        measure_all(COMPILING if compile else ())
        if not measured:
            raise ImagineFlashError(f"nothing could be measured: {pictures.left_out}")
        save(record := pictures.record(measured), out)  # with what was left out since
        if pictures.wrong:
            raise ImagineFlashError(f"wrong pictures: {'; '.join(pictures.wrong)}")
    return record


class Pictures:
    """The students that are drawn, one for each decoder, made when they are first needed."""

    def __init__(self, shape: Shape, device: str, mode: str) -> None:
        self.shape: Shape = shape
        self.device, self.mode = device, mode
        self.left_out, self.wrong = dict[str, str](), list[str]()
        self._models, self._opened = dict[str, Models](), ExitStack()

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def record(self, rows: list[Case]) -> Record:
        question = "From a prompt to a picture on the host, beside diffusers?"
        return new_record(question, rows, device=self.device, left_out=self.left_out)

    def rows(self, rows: tuple[Row, ...], rounds: int, end: float) -> Iterator[Case]:
        """Each twice. end: by the monotonic clock; what would begin later is left out, except the very first."""
        for row in rows:
            if self._models and time.monotonic() > end:
                self.left_out[_named(row)] = "the minutes were over"
                continue
            models = self.of(row.decoder)
            draws = {name: draw for name, load in models.candidates(row) if (draw := self._tried(name, row, load))}
            if EAGER not in draws:
                continue
            for again in (1, 2):
                yield models.measure({"model": self.shape, **_case(row), "run": again}, draws, row, rounds)

    def of(self, decoder: str) -> Models:
        if decoder not in self._models:
            folder = Path(self._opened.enter_context(tempfile.TemporaryDirectory())) / "student"
            random_student(folder, self.shape, tiny_decoder=decoder == "tiny")
            self._models[decoder] = Models(folder, self.device, self._opened, self.mode)
        return self._models[decoder]

    def _tried(self, name: str, row: Row, load: Callable[[], Draw]) -> Draw | None:
        """Loaded, its first picture drawn and found right; else it is left out, and the others go on."""
        try:
            draw = load()
            found = self.of(row.decoder).psnr(draw, row.steps)
        except Exception as error:  # no GPU for it, no memory, a package that is missing, what a compiler throws
            self.left_out[f"{name}, {_named(row)}"] = " ".join(str(error).split())[:300] or type(error).__name__
            return None
        if found >= LEAST_PSNR:
            return draw
        reason = f"it draws another picture ({found:.1f} dB to float32's, {LEAST_PSNR:g} are asked)"
        self.left_out[f"{name}, {_named(row)}"] = reason
        if name.startswith("ours"):
            self.wrong.append(f"{name}, {_named(row)}: {reason}")
        return None


def _case(row: Row) -> dict[str, Any]:
    also = {"also": row.also} if row.also else {}
    return {"decoder": row.decoder, "batch": row.batch, "steps": row.steps, "prompt": row.prompt, **also}


def _named(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in _case(row).items())


Draw = Callable[[str], NDArray[np.uint8]]  # a prompt -> pictures (B, H, W, 3)


class Models:
    """Every way to draw one student, each loaded when a row first asks for it; mode: of torch.compile for diffusers."""

    def __init__(self, student: Path, device: str, opened: ExitStack, mode: str) -> None:
        self.student, self.device, self.mode, self._opened = student, device, mode, opened
        with Engine.load(student, backend="torch", device=device, precision="fp32", max_batch=16) as exact:
            self.expected = {steps: exact.generate(_request(PROMPTS[0], 1, steps)).images[0] for steps in (1, 3)}
            self.shape = exact.manifest.latent_shape
        plans = read_student_manifest(student).step_plans
        self.plans = {steps: list(plan.timesteps) for steps, plan in plans.items()}
        self._engines, self._pipelines = dict[str, Engine](), dict[str, Any]()

    def candidates(self, row: Row) -> Iterator[tuple[str, Callable[[], Draw]]]:
        """The baseline first: each with what loads it, where that was not done before."""
        yield EAGER, partial(self._by_diffusers, row, EAGER)
        if row.also:
            yield (name := f"diffusers, compiled ({self.mode})"), partial(self._by_diffusers, row, name)
        left_out = {*([COMPILED] if not row.also else []), *(["torch-graph"] if self.device == "cpu" else [])}
        for backend in [name for name in OURS if name not in left_out]:
            yield OURS[backend], partial(self._by_engine, row, OURS[backend], backend)
        if row.also in TUNED:
            title = f"{OURS[COMPILED]}, {row.also}"
            yield title, partial(self._by_engine, row, title, COMPILED, **TUNED[row.also])

    def psnr(self, draw: Draw, steps: int) -> float:
        return psnr(draw(PROMPTS[0])[0], self.expected[steps])

    def measure(self, case: dict[str, Any], draws: dict[str, Draw], row: Row, rounds: int) -> Case:
        """One row: all candidates in turn, by the host's clock, since each call ends with the picture on the host."""
        found: dict[str, float] = {}

        def check(candidate: Candidate) -> Check:
            found[candidate.name] = self.psnr(draws[candidate.name], row.steps)
            error, tolerance = 100 - found[candidate.name], 100 - LEAST_PSNR
            return Check(what="PSNR to float32, below 100 dB", error=error, tolerance=tolerance)

        words = itertools.cycle(PROMPTS if row.prompt == "new" else PROMPTS[:1])
        candidates = [Candidate(name=name, run=lambda draw=draw: draw(next(words))) for name, draw in draws.items()]
        measured = measure(candidates, baseline=EAGER, check=check, case=case, warm_up=3, n=rounds, repeats=1)
        return measured.with_extra({name: {"PSNR to float32, dB": round(value, 1)} for name, value in found.items()})

    def _by_engine(self, row: Row, title: str, backend: str, **options: Any) -> Draw:
        if title not in self._engines:
            loaded = Engine.load(self.student, backend=backend, device=self.device, max_batch=16, **options)
            self._engines[title] = self._opened.enter_context(loaded)
        engine = self._engines[title]

        def draw(prompt: str) -> NDArray[np.uint8]:
            if row.prompt == "new":
                engine.prompt_cache.clear()
            return engine.generate(_request(prompt, row.batch, row.steps)).images

        return draw

    def _by_diffusers(self, row: Row, name: str) -> Draw:
        if name not in self._pipelines:
            self._pipelines[name] = _pipeline(self.student, self.device, None if name == EAGER else self.mode)
        pipeline, plan, known = self._pipelines[name], self.plans[row.steps], dict[str, Any]()
        noise = torch.from_numpy(initial_noise(1, row.batch, self.shape))

        @torch.no_grad()
        def draw(prompt: str) -> NDArray[np.uint8]:
            if row.prompt == "new" or prompt not in known:
                known[prompt] = pipeline.encode_prompt(prompt, self.device, row.batch, False)[0]
            latents = noise.to(self.device, pipeline.unet.dtype)
            images = pipeline(
                prompt_embeds=known[prompt], timesteps=plan, guidance_scale=1.0, latents=latents, output_type="pt"
            ).images
            return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        return draw


def _request(prompt: str, count: int, steps: int) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, count=count, steps=steps, seed=1)


def _pipeline(student: Path, device: str, mode: str | None) -> Any:
    """As diffusers' guide to speed has it: half precision, channels_last, and with a mode compiled, for each batch size anew as
    this project's networks are."""
    from .diffusers_student import pipeline_of

    pipeline = pipeline_of(student).to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    if mode is not None:
        options: dict[str, Any] = {"mode": "default" if device == "cpu" else mode, "dynamic": False}
        pipeline.unet = torch.compile(pipeline.unet, **options)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, **options)
    return pipeline
