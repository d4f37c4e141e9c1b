"""The engine of a server, once it is there: a server listens before its model is loaded, and says so."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from ...core.errors import EngineError, ImagineFlashError, LoadingError
from ..engine import Engine
from ..request import GenerateRequest
from ..waiting import WaitingLine
from .logs import SERVER

PROBE_EVERY = 5.0  # seconds
FAILURES = 3  # in a row: the server is not ready
LOG = logging.getLogger(SERVER)


class ServedModel:
    """An engine, or what loads one: then it is loaded in the background, and closed with the server. failed: called with what is
    wrong with a model that cannot be loaded or warmed."""

    def __init__(
        self, engine: Engine | Callable[[], Engine], failed: Callable[[ImagineFlashError], None] | None = None
    ) -> None:
        self._engine = engine if isinstance(engine, Engine) else None
        self._load = None if isinstance(engine, Engine) else engine
        self._failed = failed or (lambda error: None)
        self._failure = ""
        self._loading = Future[Engine]()
        self._thread: threading.Thread | None = None
        self._probed = -PROBE_EVERY
        self.line = WaitingLine()

    @property
    def engine(self) -> Engine:
        """Raises LoadingError while there is none, EngineError if there will be none."""
        if self._engine is None:
            raise (
                EngineError(self._failure)
                if self._failure
                else LoadingError("the model is still being loaded; try again in a moment")
            )
        return self._engine

    @property
    def is_loading(self) -> bool:
        """Also after `close`, until its thread has ended."""
        return self._thread is not None and self._thread.is_alive()

    async def load(self) -> None:
        """Load and warm what is to be loaded, in a thread that the process does not wait for at its end; a failure is logged, and
        said to whoever asks."""
        if self._load is None:
            return
        self._loading = Future[Engine]()
        self._thread = threading.Thread(target=_load, args=(self._load, self._loading), daemon=True)
        self._thread.start()
        try:
            self._engine = await asyncio.wrap_future(self._loading)
            LOG.info(self._engine.describe())
        except Exception as error:
            ours = isinstance(error, ImagineFlashError)
            self._failure = f"the model could not be loaded: {error if ours else repr(error)}"
            self._failed(error if ours else EngineError(self._failure))
            LOG.error(self._failure, exc_info=None if ours else error)

    async def close(self) -> None:
        """Of an engine that was loaded here; one that is still being loaded is not waited for, and closed once it comes."""
        if self._load is not None:
            self._engine = None
            if not self._loading.cancel() and self._loading.exception() is None:
                await asyncio.to_thread(self._loading.result().close)

    def check_ready(self) -> None:
        """Raises EngineError while there is no engine, and after three failures of the backend in a row until it draws again."""
        failing = self.engine.stats().failed_in_a_row
        if failing >= FAILURES:
            self._probe()
            raise EngineError(f"the last {failing} requests failed in the backend")

    def _probe(self) -> None:
        """Has a failing engine draw something, every few seconds, since nobody else may ask it any more."""
        if time.monotonic() >= self._probed + PROBE_EVERY:
            self._probed = time.monotonic()
            with suppress(ImagineFlashError):
                self.engine.submit(GenerateRequest(prompt="a", steps=self.engine.steps[0], timeout=PROBE_EVERY))

    def retry_after(self, pictures: int = 1) -> float:
        """Seconds after which somebody who was refused finds room, if those refused before come back as they were told."""
        return self.line.join(self.engine.stats().waiting if self._engine is not None else 0, pictures)


def _load(load: Callable[[], Engine], loading: Future[Engine]) -> None:
    """A warm engine into the future; it is closed where warming fails, and where nobody wants it any more."""
    engine = None
    try:
        engine = load()
        if not loading.cancelled():
            engine.warm_up()
        loading.set_result(engine)
    except BaseException as error:  # of the future, which was cancelled, too
        if engine is not None:
            with suppress(Exception):
                engine.close()
        with suppress(InvalidStateError):
            loading.set_exception(error)


def retry_headers(seconds: float) -> dict[str, str]:
    """Whole seconds as HTTP has it, and milliseconds as OpenAI's clients prefer them."""
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(round(1000 * seconds))}
