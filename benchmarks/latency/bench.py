"""`bench latency`: from a prompt to uint8, beside what people would use instead; each in a process of its own, in turn.

Every pair of this project's first backend and another way is a row; it is written as soon as it is measured.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ...core.errors import ImagineFlashError
from ...engine.backends.choosing import choose
from ...folders.files import CACHE_VARIABLE
from ...folders.manifests import Size, size_name
from ..records import as_line, save
from ..schema import FEWEST_ROUNDS, Case, Record, new_record
from . import energy
from .candidates import BASELINES, Candidate, CandidateError, Worker, chosen, convert, ours
from .floor import measure_floor, work_of
from .models import SHAPES, Model, find_model
from .rows import DisturbedError, Pairing, RowError, Setting

QUESTION = "How long does it take from a prompt to pixels, beside what people would use instead?"
AGAINST = tuple(name for name in BASELINES if name != "diffusers-compile")  # which compiles for minutes
GUIDANCE = 7.5  # diffusers' default


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What is measured. model: an artifact's folder, "embedded" or a shape. backends: NAME or NAME:PRECISION, the first is
    compared with every other; none: the fastest here. steps, sizes: none takes the model's. decoders: "tiny", "full", of
    shapes. pythons: baseline -> the interpreter of an environment of its own. teacher: numbers of guided steps. folder:
    where shapes and converted models are made and found again; None makes them for this run alone."""

    model: str = "embedded"
    backends: Sequence[str] = ()
    steps: Sequence[int] = ()
    sizes: Sequence[Size] = ()
    batches: Sequence[int] = (1,)
    decoders: Sequence[str] = ()
    against: Sequence[str] = AGAINST
    pythons: Mapping[str, str] = field(default_factory=dict)
    teacher: Sequence[int] = ()
    energy: bool = False
    rounds: int = 20
    folder: Path | None = None

    def check(self) -> None:
        """Raises ImagineFlashError for what cannot be measured."""
        if self.rounds < FEWEST_ROUNDS:
            raise ImagineFlashError(
                f"--rounds must be at least {FEWEST_ROUNDS}, got {self.rounds}; quantiles need them"
            )
        if self.decoders and self.model not in SHAPES:
            raise ImagineFlashError(f"--decoder is for shapes ({', '.join(SHAPES)}); {self.model} has its own")
        for decoder in self.decoders:
            if decoder not in ("tiny", "full"):
                raise ImagineFlashError(f"--decoder takes tiny and full, got {decoder!r}")
        if min(self.batches, default=0) < 1:
            raise ImagineFlashError(f"--batch takes numbers from 1, got {list(self.batches)}")


def bench_latency(out: Path, options: LatencyOptions, console: Console | None = None) -> Record:
    """Measures everything, writes `out`.json and `out`.png after every row, returns the record. console: for what is under way
    and a line of each row, by default standard error. Raises ImagineFlashError where nothing could be measured; what could
    not is named in the record, with the reason."""
    options.check()
    console = console or Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="imagine-flash-latency-") as scratch,
        console.status("finding the baselines") as status,
    ):
        run = _Run(options, Path(scratch), status.update)
        for row in run.rows():
            run.measured.append(row)
            save(run.record(), out)
            console.print(as_line(row), markup=False, soft_wrap=True)
        save(run.record(), out)  # with what was left out since
        return run.record()


class _Run:
    def __init__(self, options: LatencyOptions, scratch: Path, tell: Callable[[str], None]) -> None:
        self.options, self.scratch, self.folder, self.tell = options, scratch, options.folder or scratch, tell
        self.ways, self.left_out = chosen(options.against, options.pythons)
        self.measured: list[Case] = []
        meter = energy.meter() if options.energy else None
        if isinstance(meter, str):
            self.left_out["energy"], meter = meter, None
        self.pairing = Pairing(scratch=scratch, rounds=options.rounds, meter=meter)

    def record(self) -> Record:
        return new_record(QUESTION, self.measured, left_out=self.left_out)

    def rows(self) -> Iterator[Case]:
        options = self.options
        for decoder in options.decoders or ("tiny",):
            steps = list(options.steps) or ([1] if options.model in SHAPES else [])
            how: Any = {"decoder": decoder, "steps": steps, "sizes": options.sizes, "batch": max(options.batches)}
            how["int8"] = any(name.endswith(":int8") for name in options.backends)
            self.tell(f"making or finding {options.model}")
            model = find_model(options.model, self.folder, **how)
            about = {"decoder": decoder} if options.model in SHAPES else {}
            planned = []  # all of it before anything is measured, so that what cannot be drawn is refused at once
            for size, batch in itertools.product(options.sizes or model.manifest.sizes[:1], options.batches):
                work = work_of(model.artifact, model.manifest, size, batch)
                each = steps or sorted(model.manifest.plans)
                planned.append((size, batch, [self.pairing.setting(model, size, batch, n, about, work) for n in each]))
            if self.pairing.floor is None:
                self.tell("what this machine can do at most")
                self.pairing = replace(self.pairing, floor=measure_floor())
                assert self.pairing.floor is not None
                yield self.pairing.floor
            for size, batch, settings in planned:
                yield from self._of_size(model, size, batch, settings)

    def _of_size(self, model: Model, size: Size, batch: int, settings: Sequence[Setting]) -> Iterator[Case]:
        """The first backend's process stays; the others' come and go."""
        told = {"artifact": str(model.artifact), "student": str(model.student), "size": size, "batch": batch}
        told |= {"noise_correction": model.manifest.noise_correction}
        first, *further = ours(self.options.backends or [choose("auto", model.manifest, folder=model.artifact)])
        cache = {CACHE_VARIABLE: str(self.scratch / f"cache-{model.artifact.parent.name}-{size_name(size)}-{batch}")}
        self.tell(f"the first start of {first.name}")
        with Worker(first, told, cache) as cold:
            once = {"first start s": cold.started}
        with Worker(first, told, cache) as lead:
            lead.numbers |= once
            before = len(self.measured)
            for way in [*further, *self._ways(model)]:
                self.tell(f"{way.name} beside {first.name}")
                try:
                    converted = {"converted": str(self._converted(way, model))} if way.converted else {}
                    with Worker(way, told | converted, cache if way in further else {}) as other:
                        yield from self._of_way(lead, other, settings)
                except ImagineFlashError as error:
                    self._leave_out(way.name, lead, error)
            yield from self._teacher(lead, model, told, settings)
            if len(self.measured) == before:  # nothing to compare with
                yield from self._of_way(lead, lead, settings)

    def _of_way(
        self, lead: Worker, other: Worker, settings: Sequence[Setting], differs: Mapping[str, Any] | None = None
    ) -> Iterator[Case]:
        for setting in settings:
            try:
                yield self.pairing.row(lead, other, setting, differs)
            except RowError as error:
                self._leave_out(error.where, lead, error)

    def _leave_out(self, name: str, lead: Worker, error: ImagineFlashError) -> None:
        """Says why another way has no row; what is wrong with the first one ends the run."""
        of_lead = isinstance(error, CandidateError) and error.candidate is lead.candidate
        if of_lead and not isinstance(error, DisturbedError):
            raise error
        self.left_out[name] = str(error).removeprefix(f"{name}: ")

    def _ways(self, model: Model) -> list[Candidate]:
        if model.student is None:
            self.left_out |= {
                way.name: "no student of these plans lies in the folder 'student' beside it" for way in self.ways
            }
        return self.ways if model.student else []

    def _converted(self, way: Candidate, model: Model) -> Path:
        assert model.student is not None
        return convert(way, model.student, self.folder / model.student.parent.name)

    def _teacher(
        self, lead: Worker, model: Model, told: Mapping[str, Any], settings: Sequence[Setting]
    ) -> Iterator[Case]:
        """diffusers' many guided steps of the teacher beside the student's few: the pictures differ by intention."""
        ways = [way for way in self._ways(model) if way.told["candidate"] == "diffusers"]
        if not (self.options.teacher and ways):
            return
        medians = {way.name: [row[way.name].p50_us for row in self.measured if way.name in row.checks] for way in ways}
        way = min(ways, key=lambda one: min(medians[one.name], default=float("inf")))
        beside = model.artifact.resolve().parent / "teacher"
        folder = beside if beside.is_dir() else model.student
        for guided in self.options.teacher:
            named = replace(way, name=f"{way.name}, {guided} guided steps")
            self.tell(named.name)
            with Worker(named, {**told, "student": str(folder)}) as teacher:
                yield from self._of_way(lead, teacher, settings, {"guidance": GUIDANCE, "guided_steps": guided})
