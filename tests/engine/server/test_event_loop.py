"""What keeps the event loop free for others: noise, files, base64 and JSON are made beside it."""

import asyncio
import base64
import io
import random
import threading
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from imagine_flash.core.errors import RequestError
from imagine_flash.engine import Engine
from imagine_flash.engine.server import create_app
from imagine_flash.engine.server.drawing import BASE64_SLICE, ImageService, decoded
from imagine_flash.engine.server.schemas import ImageResponse


def encoded_picture() -> str:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


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
    noted(ImageService, "start")  # called by the route itself
    noted(Engine, "prepare")
    noted(ImageResponse, "model_dump_json")
    with Engine.load(backend="onnxruntime") as engine, TestClient(create_app(engine)) as http:
        answer = http.post("/v1/images/generations", json={"prompt": "a cat", "n": 16, "steps": 1})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 16
    assert threads.keys() == {"start", "prepare", "model_dump_json"}
    assert threads["start"] not in (threads["prepare"], threads["model_dump_json"])


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/images/generations", {"n": 2, "stream": True}),
        ("/sdapi/v1/txt2img", {"batch_size": 4, "steps": 1}),
        ("/sdapi/v1/img2img", {"init_images": [encoded_picture()], "steps": 1}),
    ],
)
def test_so_is_the_base64_of_every_api(path: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the plain answer of the OpenAI API had it done beside the event loop."""
    threads: dict[str, set[int]] = {"start": set(), "b64encode": set(), "b64decode": set()}

    def noted(owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def function(*args: Any, **named: Any) -> Any:
            threads[name].add(threading.get_ident())
            return work(*args, **named)

        monkeypatch.setattr(owner, name, function)

    monkeypatch.setattr("imagine_flash.engine.pictures.files.SMALL", 500)  # bytes
    noted(base64, "b64encode")
    noted(base64, "b64decode")
    noted(ImageService, "start")
    with Engine.load(backend="onnxruntime") as engine, TestClient(create_app(engine)) as http:
        assert http.post(path, json={"prompt": "a cat", **asked}).status_code == 200
    assert threads["b64encode"] and ("init_images" in asked) == bool(threads["b64decode"])
    assert threads["start"].isdisjoint(threads["b64encode"] | threads["b64decode"])


def test_a_long_text_is_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read in the event loop, of a stream and then of the other APIs; meanwhile nobody else was answered."""
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
            asked = {"prompt": prompt, "steps": 1}
            stream.send_json({"seq": seq, **asked})
            assert stream.receive_bytes()
            for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
                assert http.post(path, json=asked).status_code == 200
    (loop,) = {*threads[:3]}
    assert len(threads) == 6 and loop not in threads[3:]


def test_a_large_upload_is_decoded_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding 20 MB at once lets no other thread run meanwhile, the event loop's neither."""
    lengths, inner = list[int](), base64.b64decode
    monkeypatch.setattr(base64, "b64decode", lambda text, **how: lengths.append(len(text)) or inner(text, **how))
    for size in (0, 1, 3, 4, 5, 196_607, 196_608, 196_609, 1_000_000):
        file = random.Random(size).randbytes(size)
        text = base64.b64encode(file).decode()
        for sent in (text, f"data:image/png;base64,{text}"):
            assert asyncio.run(decoded(sent, "image")) == file
    assert max(lengths) == BASE64_SLICE == 2**18 and len(lengths) > 20


LETTERS = base64.b64encode(bytes(300_000)).decode()


@pytest.mark.parametrize("size", [8, 2**18, 2**18 + 4, 400_000])
def test_what_is_no_base64_is_refused_wherever_it_is(size: int) -> None:
    good = LETTERS[:size]
    assert asyncio.run(decoded(good, "image")) == bytes(3 * size // 4)
    wrong = [good[:-1], good[:-3], f"{good}=", f"{good}====", f"{good}A", f"{good}A===", f"{good[:-2]}=A"]
    ends = [at for at in (1, 4, 2**18, size) if at <= size]  # of slices too
    wrong += [good[: at - len(sign)] + sign + good[at:] for at in ends for sign in ("*", "\n", "é", "\0")]
    wrong += [good[: at - len(sign)] + sign + good[at:] for at in ends if at < size for sign in ("=", "==")]
    for text in wrong:
        with pytest.raises(RequestError, match="image: send a picture in base64"):
            asyncio.run(decoded(text, "image"))
