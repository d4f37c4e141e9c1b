"""Conditioning pictures through the doors of the server: in base64, and as uploads, with the limits of all uploads."""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from imagine_flash.core.errors import RequestError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.server import ServerSettings, create_app
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.tests import control, pipelines
from imagine_flash.tests.engine.server.conftest import picture, png

CONDITION = png(control.picture(1))
ENCODED = base64.b64encode(CONDITION).decode()
DRAW, EDIT = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny student, and a ControlNet for it."""
    folder = tmp_path_factory.mktemp("control")
    network = control.saved(control.build_controlnet(pipelines.build_pipeline().unet), folder / "network")
    return pipelines.build_student(folder / "student", half=False), network


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    student, network = folders
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path_factory.mktemp("cache")))
        controlled = student_of(student, ModelOptions(controlnet=str(network)))
    with Engine.load(controlled) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, ServerSettings(max_body=100_000))) as client:
        yield client


def drawn(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(picture(answer.json()["data"][0]["b64_json"])).astype(int)


def test_it_is_read_at_both_doors(engine: Engine, http: TestClient) -> None:
    asked = {"prompt": "a cat", "seed": 7, "condition_scale": 0.5}
    expected = engine.generate(
        GenerateRequest(prompt="a cat", seed=7, condition=control.picture(1), condition_scale=0.5)
    ).images[0]
    for condition in (ENCODED, f"data:image/png;base64,{ENCODED}"):
        assert np.abs(drawn(http.post(DRAW, json={**asked, "condition": condition})) - expected).max() <= 1
    form: Any = {name: str(value) for name, value in asked.items()}
    assert np.abs(drawn(http.post(EDIT, data=form, files={"condition": CONDITION})) - expected).max() <= 1
    plain = drawn(http.post(DRAW, json={"prompt": "a cat", "seed": 7}))
    assert np.abs(plain - expected).max() > 1
    start = {"condition": CONDITION, "image": png(control.picture(2))}
    assert np.abs(drawn(http.post(EDIT, data=form, files=start)) - expected).max() > 1
    large = png(control.picture(1, side=512))
    assert np.abs(drawn(http.post(EDIT, data=form, files={"condition": large})) - expected).max() <= 2  # scaled


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"condition": "*"}, 400, "condition: send a picture in base64"),
        ({"condition": "AAAA"}, 400, "condition is no PNG, JPEG or WebP that can be read"),
        ({"condition": ENCODED, "condition_scale": -1}, 400, "condition_scale"),
        ({"condition": ENCODED, "condition_scale": 1e9}, 400, "condition_scale"),
        ({"condition_scale": 0.5}, 400, "condition_scale needs a condition"),
        ({"condition": "A" * 200_000}, 413, "more than 100,000 bytes"),
        ({"condition": "file:///etc/passwd"}, 400, "condition: send a picture in base64"),
        ({"condition": "http://127.0.0.1/"}, 400, "condition: send a picture in base64"),
    ],
)
def test_what_is_no_condition(http: TestClient, body: dict[str, Any], status: int, says: str) -> None:
    answer = http.post(DRAW, json={"prompt": "a cat", **body})
    assert answer.status_code == status and says in answer.json()["error"]["message"], answer.text


def test_an_upload_has_the_limits_of_all(engine: Engine) -> None:
    with TestClient(create_app(engine, ServerSettings(max_pixels=64 * 64))) as http:
        large = {"condition": png(control.picture(1, side=128))}
        answer = http.post(EDIT, data={"prompt": "a cat"}, files=large)
        assert answer.status_code == 400 and "condition has 128x128 pixels" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "condition"
        nothing = http.post(EDIT, data={"prompt": "a cat"}, files={"mask": CONDITION})
        assert "exactly one picture is drawn from, got 0" in nothing.json()["error"]["message"]


def test_a_model_without_says_so_before_it_unpacks(folders: tuple[Path, Path]) -> None:
    with Engine.load(folders[0]) as engine, TestClient(create_app(engine)) as http:
        for answer in (
            http.post(DRAW, json={"prompt": "a cat", "condition": "AAAA"}),
            http.post(EDIT, data={"prompt": "a cat"}, files={"condition": b"none"}),
        ):
            assert answer.status_code == 400 and "reads no conditioning picture" in answer.json()["error"]["message"]
        with http.websocket_connect("/v1/stream") as socket:
            assert socket.receive_json()["condition"] is False
            socket.send_json({"seq": 1, "prompt": "a cat", "condition_scale": 1})
            assert "reads no conditioning picture" in socket.receive_json()["error"]["message"]


def test_a_stream_draws_under_the_one_that_was_sent_last(engine: Engine, http: TestClient) -> None:
    start, other = control.picture(2), control.picture(3)
    with http.websocket_connect("/v1/stream") as socket:
        ready = socket.receive_json()
        known = http.get("/v1/models").json()["data"][0]
        assert ready["condition"] and all(known[name] == ready[name] for name in ("condition", "loras", "guidance"))

        def ask(seq: int, **fields: Any) -> Any:
            """The pixels, or the error."""
            socket.send_json({"seq": seq, "prompt": "a cat", "seed": 7, "format": "png", **fields})
            message = socket.receive()
            if (data := message.get("bytes")) is None:
                return json.loads(message["text"])["error"]
            (length,) = struct.unpack(">I", data[:4])
            return np.asarray(picture(data[4 + length :])).astype(int)

        def draws(got: Any, **request: Any) -> bool:
            expected = engine.generate(GenerateRequest(prompt="a cat", seed=7, **request)).images[0]
            return bool(np.abs(got - expected).max() <= 1)

        error = ask(1, condition_scale=0.5)
        assert error["param"] == "condition_scale" and 'the text {"type": "condition"}' in error["message"]
        socket.send_json({"type": "condition"})
        socket.send_bytes(b"none")
        assert "condition is no PNG, JPEG or WebP that can be read" in ask(2, condition_scale=0.5)["message"]
        assert ask(3, condition_scale=11)["param"] == "condition_scale"
        socket.send_json({"type": "condition"})
        socket.send_bytes(CONDITION)
        assert draws(ask(4, condition_scale=0.5), condition=control.picture(1), condition_scale=0.5)
        socket.send_bytes(png(start))  # a picture to start from: the condition stays
        both = ask(5, condition_scale=1, strength=0.5)
        assert draws(both, condition=control.picture(1), condition_scale=1, image=start, strength=0.5)
        assert draws(ask(6))
        socket.send_json({"type": "condition"})
        socket.send_bytes(png(other))
        assert draws(ask(7, condition_scale=1), condition=other)
        assert ready["guidance"] is None, "so both are ignored, as over HTTP"
        assert draws(ask(8, guidance_scale=3, negative_prompt="a dog")) and draws(ask(9, negative_prompt="a dog"))


@pytest.mark.parametrize("name", ["controlnet", "tiny_decoder"])
def test_replicas_load_it_as_part_of_an_artifact(folders: tuple[Path, Path], name: str) -> None:
    given: dict[str, Any] = {name: str(folders[1])}
    settings = ServerSettings(model=folders[0], **given)
    with pytest.raises(RequestError, match=f"{name}: goes with a server on this machine alone.*--{name[:4]}"):
        settings.check_model()


@pytest.mark.slow
def test_serve_takes_it_as_an_option(
    start_server: Callable[..., Any], folders: tuple[Path, Path], engine: Engine, monkeypatch: Any, tmp_path: Path
) -> None:
    import httpx

    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path))
    server = start_server("--model", folders[0], "--controlnet", folders[1], "--backend", "torch", seconds=120)
    answer = httpx.post(f"{server.url}{DRAW}", json={"prompt": "a cat", "seed": 7, "condition": ENCODED}, timeout=60)
    expected = engine.generate(GenerateRequest(prompt="a cat", seed=7, condition=control.picture(1))).images[0]
    assert np.abs(drawn(answer) - expected).max() <= 1
