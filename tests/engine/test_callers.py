"""What callers do with an engine and its futures: they wait, interrupt, call back, and forget; nobody else notices."""

import asyncio
import concurrent.futures
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine_flash.core.errors import EngineError, RequestError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.loading import LoadOptions
from imagine_flash.engine.work import Client, Drawing, Prepared


@pytest.fixture
def engine(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        yield engine


@pytest.fixture
def held(engine: Engine) -> Iterator[threading.Event]:
    """What the network waits for."""
    go, inner = threading.Event(), engine.backend.denoise

    def denoise(*given: Any) -> Any:
        assert go.wait(20)
        return inner(*given)

    engine.backend.denoise = denoise  # type: ignore[method-assign]
    yield go
    go.set()


def test_who_waits_for_several_is_told_of_the_cancelled(engine: Engine, held: threading.Event) -> None:
    """`wait` and `as_completed` waited for ever: nobody had told them."""
    futures = [engine.submit("a cat", seed=seed) for seed in range(4)]
    assert futures[2].cancel() and futures[2].cancel() and futures[2].cancelled()
    held.set()
    done, waiting = concurrent.futures.wait(futures, timeout=20)
    assert not waiting and {future.cancelled() for future in done} == {True, False}


def test_a_future_that_is_cancelled_by_many_at_once_is_told_once(engine: Engine, held: threading.Event) -> None:
    future, found = engine.submit("a cat"), list[bool]()
    threads = [threading.Thread(target=lambda: found.append(future.cancel())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8 and concurrent.futures.wait([future], 5).done


def test_an_interrupt_takes_the_work_back(
    engine: Engine, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was drawn to its end, and the next request waited for it."""

    def interrupted(_: Drawing) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Drawing, "result", interrupted)
        engine.generate("a cat", count=64)
    held.set()
    assert engine.generate("a dog").images.any() and engine.stats().cancelled == 1


def test_a_callback_that_would_end_the_thread_ends_nothing(engine: Engine) -> None:
    """SystemExit ended the thread that draws, without a word, and every later request waited for ever."""
    future = engine.submit("a cat")
    future.add_done_callback(lambda _: sys.exit(1))
    other = engine.submit("a dog")
    assert other.result(20).images.any() and engine.submit("a fox").result(20).images.any()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_the_thread_nobody_waits_for_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.batcher._share, "next_group", lambda *_, **__: sys.exit("out"))
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit("a cat").result(20)
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit("a dog")


def test_a_callback_that_would_wait_for_itself_is_told(engine: Engine, held: threading.Event) -> None:
    """It waited for the thread that it was called in, and so did everybody else."""
    found, done = list[object](), threading.Event()

    def again(_: object) -> None:
        try:
            engine.generate("a dog")
        except EngineError as error:
            found.append(str(error))
        engine.submit("a dog").add_done_callback(lambda _: done.set())

    engine.submit("a cat").add_done_callback(again)
    held.set()
    assert done.wait(20) and "call submit there" in str(found)


def test_an_engine_that_is_forgotten_draws_what_it_was_asked_for(tiny_artifact: Path) -> None:
    """Its future said that the engine was closed, which nobody had done."""
    future = Engine.load(tiny_artifact, backend="onnxruntime").submit("a cat", count=16)
    assert len(future.result(60).images) == 16 and future._engine is None


def test_the_event_loop_goes_on_while_noise_is_drawn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, begun, go = engine.prepare, threading.Event(), threading.Event()

    def slow(request: GenerateRequest) -> Prepared:
        begun.set()
        assert go.wait(20), "the event loop, which lets it go on, does not"
        return inner(request)

    monkeypatch.setattr(engine, "prepare", slow)

    async def both() -> None:
        drawing = asyncio.ensure_future(engine.agenerate("a cat"))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        go.set()
        assert (await drawing).images.any()

    asyncio.run(both())


@pytest.mark.parametrize(
    ("client", "says"),
    [
        ({"weight": 0}, "weight must be a number above 0, got 0"),
        ({"weight": -1.0}, "got -1.0"),
        ({"weight": float("nan")}, "got nan"),
        ({"name": ["a", "list"]}, r"name must be a text, got \['a', 'list'\]"),
    ],
)
def test_a_client_that_cannot_be_served(client: dict[str, Any], says: str) -> None:
    """A weight of 0 failed everybody's requests, and a name that is no key ended the thread."""
    with pytest.raises(RequestError, match=says):
        Client(**client)


def test_options_twice_are_refused(tiny_artifact: Path) -> None:
    with pytest.raises(RequestError, match="have their own max_batch, nonsense"):
        Engine.load(tiny_artifact, LoadOptions(backend="onnxruntime"), max_batch=2, nonsense=1)


def test_a_picture_that_is_none_is_named(engine: Engine) -> None:
    class OnAnotherDevice:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    for picture, says in (
        ([[1, 2], [3]], "got list"),
        (OnAnotherDevice(), r"got OnAnotherDevice \(can't convert cuda"),
    ):
        for name in ("image", "mask"):
            given: dict[str, Any] = {"image": np.zeros((64, 64, 3), np.uint8), name: picture}
            with pytest.raises(RequestError, match=f"{name} must be .*{says}"):
                engine.generate("a cat", **given)


@pytest.mark.parametrize(
    ("asked", "backend"),
    [
        ({}, "onnxruntime"),
        ({"precision": "bf16"}, "auto"),
        ({"device": "gpu"}, "auto"),
        ({"device": "cuda:1"}, "onnxruntime"),
    ],
)
def test_with_loras_the_backend_can_do_what_else_is_asked(asked: dict[str, Any], backend: str) -> None:
    """onnxruntime was taken whatever else was asked, and its error told to export again."""
    assert LoadOptions(loras={"pixel": "pixel.safetensors"}, **asked).of_artifacts == backend
