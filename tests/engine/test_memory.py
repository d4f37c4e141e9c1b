"""A server that runs for weeks: requests leave nothing behind."""

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from imagine_flash.benchmarks.processes import grown_mb
from imagine_flash.engine import Engine
from imagine_flash.engine.server import create_app
from imagine_flash.engine.server.drawing import ImageService


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_memory_is_flat(backend: str, tiny_artifact: Path) -> None:
    """After 200 requests, 2,000 more add less than 20 MB; a kept picture of each would be 25 MB."""
    pytest.importorskip(backend)
    pytest.importorskip("psutil")
    with Engine.load(tiny_artifact, backend=backend) as engine:
        engine.warm_up()
        gc.collect()
        assert grown_mb(engine, 2000, 1) < 20
        assert engine.batcher.waiting == 0 and engine.batcher.counts["failed"] == 0


def is_forgotten(what: "weakref.ref[Any]") -> bool:
    """Within ten seconds, while nothing else is asked for."""
    limit = time.monotonic() + 10
    while what() is not None and time.monotonic() < limit:
        time.sleep(0.01)
        gc.collect()
    return what() is None


def test_an_idle_engine_keeps_no_picture(tiny_artifact: Path) -> None:
    """It kept those of its last request until the next one came."""
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        pictures = weakref.ref(engine.generate("a cat", steps=1, count=2).images)
        assert is_forgotten(pictures)


def test_neither_does_an_idle_stream(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each that was open, the last picture was kept: by the session and by what had sent it."""
    pictures, drawn = [], ImageService.drawn
    monkeypatch.setattr(
        ImageService, "drawn", lambda *given: pictures.append(weakref.ref(given[1].images)) or drawn(*given)
    )
    with (
        Engine.load(tiny_artifact, backend="onnxruntime") as engine,
        TestClient(create_app(engine)) as http,
        http.websocket_connect("/v1/stream") as stream,
    ):
        stream.receive_json()
        for preview in (False, True):
            stream.send_json({"seq": 1 + preview, "prompt": "a cat", "steps": 2, "preview": preview})
            for _ in range(1 + preview):
                assert stream.receive_bytes()
        assert len(pictures) == 3 and all(map(is_forgotten, pictures))
