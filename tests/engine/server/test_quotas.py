"""Quotas of pictures, of many requests at once."""

import asyncio
import threading
from collections.abc import Awaitable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from imagine_flash.engine import Engine
from imagine_flash.engine.pictures.uploads import UploadReader
from imagine_flash.engine.server import ServerSettings, create_app
from imagine_flash.engine.server.drawing import ImageService
from imagine_flash.tests.engine.server.conftest import post

DRAW = "/v1/images/generations"


def test_requests_at_once_share_it_and_what_was_not_drawn_is_given_back(tiny_artifact: Path) -> None:
    """It was looked at when a request came and counted once that was drawn, so forty at once were all answered."""
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        app = create_app(engine, ServerSettings(quota="5/hour"))

        async def at_once() -> tuple[list[httpx.Response], list[httpx.Response]]:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:

                def draw(**fields: object) -> Awaitable[httpx.Response]:
                    return http.post(DRAW, json={"prompt": "a cat", "steps": 1, **fields})

                refused = [await draw(steps=9), await draw(steps=9, stream=True), await draw(n=6)]
                return refused, await asyncio.gather(*(draw(stream=i % 2 == 0) for i in range(40)))

        refused, answers = asyncio.run(at_once())
    assert [answer.status_code for answer in refused] == [400] * 3
    assert "6 pictures are more than the whole quota of 5 per 1 hour; ask for at most 5" in refused[2].text
    assert refused[2].json()["error"]["param"] == "n" and "retry-after" not in refused[2].headers
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 35
    assert all(int(one.headers["retry-after"]) >= 1 for one in answers if one.status_code == 429)


@pytest.mark.parametrize("stays", [True, False])
def test_who_leaves_after_the_preview_has_had_the_pictures(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """They cost nothing and were in no metrics: a quota of 8 pictures an hour gave 96 in one step. Who stays pays once."""
    gone, inner = asyncio.Event(), ImageService.start
    started = []

    def start(self: ImageService, *given: Any) -> Any:
        started.append(given)
        if len(started) == 2 and not stays:  # the whole picture, of which the preview was handed over
            gone.set()
        return inner(self, *given)

    monkeypatch.setattr(ImageService, "start", start)
    body = {"prompt": "a cat", "n": 2, "stream": True, "partial_images": 1}
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        app = create_app(engine, ServerSettings(quota="4/hour"))
        events = asyncio.run(post(app, body, gone))
        http = TestClient(app, client=("192.0.2.1", 50_000))
        assert [http.post(DRAW, json={"prompt": "a cat", "n": n}).status_code for n in (3, 2, 1)] == [429, 200, 429]
        counts = http.get("/metrics").text
    assert events.count(b"event: image_generation.partial_image") == 2
    assert events.count(b"event: image_generation.completed") == (2 if stays else 0)
    assert ('imagine_flash_requests_total{steps="1"} 1.0' in counts) == (not stays)
    assert f'imagine_flash_requests_total{{steps="3"}} {2 if stays else 1}.0' in counts


def test_sockets_that_are_open_at_once_share_it(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer text takes the place of the one before, and who leaves gives it back. A preview counts as its picture."""
    entered, go = threading.Event(), threading.Event()
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine, ExitStack() as opened:
        inner = engine.backend.denoise

        def held(*given: object) -> object:
            entered.set()
            assert go.wait(20)
            return inner(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(engine.backend, "denoise", held)
        http = opened.enter_context(TestClient(create_app(engine, ServerSettings(quota="1/hour"))))

        def ask(socket, seq: int) -> None:
            socket.send_json({"seq": seq, "prompt": "a cat", "preview": True})

        def refused(socket) -> bool:
            return "quota" in socket.receive_json()["error"]["message"]

        first, second = (opened.enter_context(http.websocket_connect("/v1/stream")) for _ in range(2))
        assert first.receive_json()["type"] == second.receive_json()["type"] == "ready"
        with http.websocket_connect("/v1/stream") as gone:
            assert gone.receive_json()["type"] == "ready"
            ask(gone, 1)
            assert entered.wait(20)
            ask(first, 1)
            assert refused(first)
        for seq in (2, 3):
            ask(first, seq)
        ask(second, 1)
        assert refused(second) and http.post(DRAW, json={"prompt": "a cat"}).status_code == 429
        go.set()
        assert first.receive_bytes()
        ask(second, 2)
        assert refused(second)


def test_whoever_has_none_left_has_no_picture_unpacked(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was unpacked and scaled before the quota was asked. One that cannot be read takes nothing of it."""
    unpacked, inner = [], UploadReader.image

    async def image(self: UploadReader, *given: Any) -> Any:
        unpacked.append(given)
        return await inner(self, *given)

    monkeypatch.setattr(UploadReader, "image", image)
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        app = create_app(engine, ServerSettings(quota="1/hour"))
        with TestClient(app) as http, http.websocket_connect("/v1/stream") as socket:
            assert socket.receive_json()["type"] == "ready"
            socket.send_bytes(b"none")
            said = []
            for seq in (1, 2):
                socket.send_json({"seq": seq, "prompt": "a cat", "strength": 0.5})
                said.append(socket.receive_json()["error"]["message"])
                answer = http.post(DRAW, json={"prompt": "a cat", "steps": 1})
                assert answer.status_code == (200 if seq == 1 else 429)
        files = {"image": b"none"}
        for answer in (
            http.post("/v1/images/edits", data={"prompt": "a cat"}, files=files),
            http.post("/sdapi/v1/img2img", json={"prompt": "a cat", "init_images": ["bm9uZQ=="]}),
        ):
            assert answer.status_code == 429, answer.text
    assert "image is no PNG" in said[0] and "quota" in said[1] and len(unpacked) == 1
