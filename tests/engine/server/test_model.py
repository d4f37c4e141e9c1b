"""A server before its model is loaded, and without one."""

import signal
import threading
import time
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.engine import Engine
from imagine_flash.engine.server import create_app
from imagine_flash.tests.engine.server.test_operations import run


def until(what: Callable[[], object]) -> None:
    limit = time.monotonic() + 10
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


class Loaded:
    """What is asked of an engine before somebody draws. broken: it cannot be warmed."""

    def __init__(self, *, broken: bool = False) -> None:
        self.closed, self.broken = False, broken

    def warm_up(self) -> None:
        if self.broken:
            raise RuntimeError("out of memory")

    def close(self) -> None:
        self.closed = True


def test_a_model_that_fails_to_load_is_said_by_readyz() -> None:
    def load() -> Engine:
        raise RuntimeError("out of luck")

    with TestClient(create_app(load)) as http:
        until(lambda: "out of luck" in http.get("/readyz").text)
        assert http.get("/readyz").status_code == 503


def test_the_end_does_not_wait_for_a_model_which_is_closed_once_it_comes() -> None:
    """Ctrl-C did nothing until the model was loaded and warm, which may be minutes."""
    engine, there = Loaded(), threading.Event()

    def load() -> Engine:
        there.wait(60)
        return engine  # type: ignore[return-value]

    started = time.monotonic()
    with TestClient(create_app(load)) as http:
        assert http.get("/readyz").status_code == 503
    assert time.monotonic() - started < 10 and not engine.closed
    there.set()
    until(lambda: engine.closed)


def test_a_model_that_fails_to_warm_up_is_closed_and_said() -> None:
    engine, said = Loaded(broken=True), list[ImagineFlashError]()
    with TestClient(create_app(lambda: engine, failed=said.append)) as http:  # type: ignore[arg-type, return-value]
        until(lambda: said)
        assert engine.closed and "out of memory" in http.get("/readyz").text
    assert "could not be loaded: RuntimeError('out of memory')" in str(said[0])


@pytest.mark.slow
def test_a_model_that_fails_to_warm_up_ends_the_command(tiny_artifact) -> None:
    """It listened for ever, and was never ready."""
    broken = "from imagine_flash.engine import Engine; Engine.warm_up = lambda self: 1 / 0; "
    line = run("--model", tiny_artifact, "--backend", "onnxruntime", "--port", "0", url=True, before=broken)
    assert "could not be loaded: ZeroDivisionError" in line


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_server_that_loads(start_server, tiny_artifact, number: int, code: int) -> None:
    slow = "import time; from imagine_flash.engine.server import ServerSettings; "
    slow += "ServerSettings.load_engine = lambda self: print('loading', flush=True) or time.sleep(60); "
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", seconds=0, before=slow)
    until(lambda: "loading" in server.log.read_text())
    server.process.send_signal(number)
    assert server.process.wait(30) == code
    assert "Traceback" not in server.log.read_text()
