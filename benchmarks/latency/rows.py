"""One row of `bench latency`: two ways to draw the same, checked against torch's picture and timed in turn."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ImagineFlashError
from ...core.images import psnr
from ...core.noise import initial_noise
from ...folders.manifests import ReferencePicture, Size, size_name
from ..harness import case_of
from ..pictures import WORDS, check_pictures, read_picture
from ..schema import Case, Check
from .candidates import CandidateError, Worker
from .floor import Work, floor_seconds
from .models import Model

EXACT, ROUNDED = 40.0, 20.0  # dB to torch's picture: of float32, of less (random weights amplify what is rounded)
MOST_OTHERS = 0.15  # of the processors: what other programs may take while a row is measured
REST = 0.02  # seconds; torch's threads spin for a few milliseconds
STAGES = {"text_encoder": "text", "denoiser": "network", "decoder": "decoder"}  # graph -> what workers call it


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row's settings, and the picture that both must draw. work: of each stage's call."""

    case: Mapping[str, Any]
    asked: Mapping[str, Any]
    prompts: Iterator[str]
    expected: NDArray[np.uint8]  # (H, W, 3)
    work: Mapping[str, Work]


class RowError(CandidateError):
    """Why there is no row of this candidate at this setting."""

    def __init__(self, worker: Worker, setting: Setting, reason: str) -> None:
        super().__init__(worker.candidate, reason)
        case = setting.case
        self.where = f"{worker.name}, {case['size']}, batch {case['batch']}, steps {case['steps']}"


class DisturbedError(RowError):
    """Other programs took too much of the processors: what was measured would say more of them."""

    def __init__(self, worker: Worker, setting: Setting, share: float) -> None:
        super().__init__(
            worker, setting, f"disturbed: other programs took {share:.0%} of the processors; measure again"
        )


class WrongPictureError(RowError):
    """A picture that is not the reference's."""

    def __init__(self, worker: Worker, setting: Setting, allowed: float) -> None:
        found = worker.numbers["PSNR dB"]
        reason = f"refused: it draws another picture ({found:.1f} dB to torch's, {allowed:g} are asked)"
        super().__init__(worker, setting, reason)


class OthersLoad:
    """What programs other than these processes take of the processors that this one may use, from now on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = sorted(set(pids))
        self._before = self._now()

    def share(self) -> float:
        """0 to 1; 0 where nothing was counted yet."""
        seconds, busy, own = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return max(0.0, busy - own) / seconds if seconds > 0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        import psutil

        cores = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
        of_core = psutil.cpu_times(percpu=True)
        times = [of_core[i] for i in cores or range(len(of_core))]
        idle = sum(one.idle + getattr(one, "iowait", 0.0) for one in times)
        total = sum(sum(one[:8]) for one in times)  # guests are counted in user already
        own = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in self._pids)
        return total, total - idle, own


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """How rows are measured. scratch: a folder for noise and pictures; meter: joules so far; floor: the machine's row."""

    scratch: Path
    rounds: int
    meter: Callable[[], float] | None = None
    floor: Case | None = None

    def setting(
        self, model: Model, size: Size, batch: int, steps: int, about: Mapping[str, Any], work: Mapping[str, Work]
    ) -> Setting:
        """Raises ImagineFlashError where the artifact holds no picture to compare with."""
        manifest = model.manifest
        reference = _reference(model, size, steps)
        noise = self.scratch / f"noise-{size_name(size)}-{batch}-{reference.seed}.npy"
        np.save(noise, initial_noise(reference.seed, batch, manifest.latent_shape_of(size)))
        known = sorted({word for spec in manifest.tokenizers for word in spec.known_words if word.isalpha()})
        return Setting(
            case={"model": model.name, **about, "size": size_name(size), "batch": batch, "steps": steps},
            asked={
                "steps": steps,
                "plan": list(manifest.plans[steps]),
                "seed": reference.seed,
                "noise": str(noise),
                "prompts": [reference.prompt] * batch,
            },
            prompts=itertools.cycle(known or WORDS.split()),
            expected=read_picture(model.artifact / reference.file),
            work=work,
        )

    def row(self, lead: Worker, other: Worker, setting: Setting, differs: Mapping[str, Any] | None = None) -> Case:
        """One row. differs: what the other is asked for besides, if its picture is another's."""
        checks = {lead.name: self.check(lead, setting, {})}
        checks[other.name] = self.check(other, setting, differs or {}, compared=differs is None)
        seconds: dict[str, list[float]] = {other.name: [], lead.name: []}
        answers: dict[str, list[dict[str, Any]]] = {other.name: [], lead.name: []}
        pairs = ((other, differs or {}), (lead, {}))[other is lead :]
        busy = OthersLoad([os.getpid(), lead.pid, other.pid])
        for i in range(self.rounds + 1):
            prompts = list(itertools.islice(setting.prompts, len(setting.asked["prompts"])))
            for worker, more in pairs:
                time.sleep(REST)
                answer = self._metered(worker, {**setting.asked, "prompts": prompts, **more})
                if i:  # the first round warms up
                    seconds[worker.name].append(answer["seconds"])
                    answers[worker.name].append(answer)
        if (share := busy.share()) > MOST_OTHERS:
            raise DisturbedError(other, setting, share)
        row = case_of(seconds, baseline=other.name, checks=checks, case=setting.case)
        batch = len(setting.asked["prompts"])
        extra = {worker.name: _numbers(worker, answers[worker.name], batch) for worker in (other, lead)}
        extra[lead.name] |= self._shares(lead, extra[lead.name], setting)
        return row.with_extra(extra)

    def _metered(self, worker: Worker, asked: Mapping[str, Any]) -> dict[str, Any]:
        if self.meter is None:
            return worker.draw(asked)
        before = self.meter()
        answer = worker.draw(asked)
        return {**answer, "joules": self.meter() - before}

    def check(self, worker: Worker, setting: Setting, more: Mapping[str, Any], *, compared: bool = True) -> Check:
        """Draws the reference's picture. Raises WrongPictureError where it is another."""
        file = self.scratch / "picture.npy"
        file.unlink(missing_ok=True)
        answer = worker.draw({**setting.asked, **more, "output": str(file)})
        worker.numbers.setdefault("first ms", 1e3 * answer["seconds"])
        got = np.load(file)
        if not compared:
            flat = float(got.shape[1:] != setting.expected.shape or got.min() == got.max())
            return Check(what="flat pictures, or of another size", error=flat, tolerance=0)
        exact = worker.candidate.exact or worker.about.endswith("fp32")
        worker.numbers["PSNR dB"] = psnr(got[0], setting.expected) if got.shape[1:] == setting.expected.shape else 0.0
        check = check_pictures(got[:1], setting.expected[None], {"psnr": EXACT if exact else ROUNDED})
        if not check.passed:
            raise WrongPictureError(worker, setting, EXACT if exact else ROUNDED)
        return check

    def _shares(self, lead: Worker, numbers: Mapping[str, float], setting: Setting) -> dict[str, float]:
        """How much of what the machine can do each stage reaches, in percent."""
        precision, found = lead.about.split()[-1], dict[str, float]()
        if self.floor is None or precision not in ("fp32", "bf16", "int8"):
            return found
        for stage, name in STAGES.items():
            seconds = numbers.get(f"{name} ms", 0.0) / 1e3
            calls = setting.asked["steps"] if stage == "denoiser" else 1
            if stage in setting.work and seconds > 0:
                least = calls * floor_seconds(setting.work[stage], self.floor, precision)
                found[f"{name} % of floor"] = round(100 * least / seconds, 1)
        return found


def _reference(model: Model, size: Size, steps: int) -> ReferencePicture:
    """What torch drew at export. Raises ImagineFlashError where there is none to compare with."""
    for reference in model.manifest.references:
        if reference.steps == steps and tuple(reference.size) == tuple(size):
            return reference
    known = sorted({(reference.steps, size_name(reference.size)) for reference in model.manifest.references})
    there = ", ".join(f"{n} at {shown}" for n, shown in known)
    raise ImagineFlashError(
        f"{model.artifact} holds no picture of {steps} steps at {size_name(size)} to compare with (steps: {there}); "
        "export the student with these steps and sizes"
    )


def _numbers(worker: Worker, answers: Sequence[Mapping[str, Any]], batch: int) -> dict[str, float]:
    """Medians over the rounds, and what the worker has shown so far."""
    found = {"start s": worker.started, **worker.numbers}
    for stage in answers[0]["stages"]:
        found[f"{stage} ms"] = 1e3 * float(np.median([answer["stages"][stage] for answer in answers]))
    if answers[0]["stages"]:
        rest = [answer["seconds"] - sum(answer["stages"].values()) for answer in answers]
        found["rest ms"] = 1e3 * float(np.median(rest))
    if batch > 1:
        found["pictures/s"] = batch / float(np.median([answer["seconds"] for answer in answers]))
    found |= {f"{name} GiB": answers[-1][name] for name in ("peak", "resident", "own") if name in answers[-1]}
    if "joules" in answers[0]:
        found["J"] = float(np.mean([answer["joules"] for answer in answers])) / batch
    return {name: float(f"{value:.4g}") for name, value in found.items()}
