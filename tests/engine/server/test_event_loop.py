"""What keeps the event loop free for others: noise, files, base64 and JSON are made beside it."""

import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from imagine_flash.engine import Engine
from imagine_flash.engine.server import create_app
from imagine_flash.engine.server.drawing import Studio
from imagine_flash.engine.server.schemas import ImageResponse


def test_what_takes_long_is_done_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON of 64 large pictures took two seconds, in which nobody else was answered."""
    threads: dict[str, int] = {}

    def noted(owner: type, name: str) -> None:
        work = getattr(owner, name)

        def method(*args: Any, **named: Any) -> Any:
            threads[name] = threading.get_ident()
            return work(*args, **named)

        monkeypatch.setattr(owner, name, method)

    monkeypatch.setattr(
        "imagine_flash.engine.pictures.files.SMALL", 50_000
    )  # bytes; the model's pictures are small ones
    noted(Studio, "start")  # called by the route itself
    noted(Engine, "prepare")
    noted(ImageResponse, "model_dump_json")
    with Engine.load(backend="onnxruntime") as engine, TestClient(create_app(engine)) as http:
        answer = http.post("/v1/images/generations", json={"prompt": "a cat", "n": 16, "steps": 1})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 16
    assert threads.keys() == {"start", "prepare", "model_dump_json"}
    assert threads["start"] not in (threads["prepare"], threads["model_dump_json"])


def test_a_long_text_is_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream it was read in the event loop, in which meanwhile nobody else was answered."""
    threads: list[int] = []
    prepare = Engine.prepare
    monkeypatch.setattr(Engine, "prepare", lambda *given: threads.append(threading.get_ident()) or prepare(*given))
    with (
        Engine.load(backend="onnxruntime") as engine,
        TestClient(create_app(engine)) as http,
        http.websocket_connect("/v1/stream") as stream,
    ):
        stream.receive_json()
        for seq, prompt in enumerate(("a cat", "a cat " * 1000), 1):
            stream.send_json({"seq": seq, "prompt": prompt, "steps": 1})
            assert stream.receive_bytes()
    short, long = threads
    assert short != long
