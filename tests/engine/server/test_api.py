"""The image API of a real server process: with OpenAI's own client, and with what nobody should send."""

import base64
import concurrent.futures
import io
import json
import socket
import struct
import zlib

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.tests.engine.server.conftest import picture, png


def pixels_of(data: str | bytes) -> np.ndarray:
    return np.asarray(picture(data)).astype(int)


def test_openais_client_draws_what_the_engine_draws(client: openai.OpenAI, tiny_artifact) -> None:
    got = client.images.generate(prompt="a cat", n=2, size="64x64", extra_body={"seed": 7, "steps": 2})  # type: ignore[arg-type]
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        expected = engine.generate(GenerateRequest(prompt="a cat", count=2, seed=7, steps=2)).images
    assert got.data is not None and len(got.data) == 2
    for one, image in zip(got.data, expected, strict=True):
        assert one.b64_json and np.abs(pixels_of(one.b64_json) - image).max() <= 1


def test_openais_client_edits(client: openai.OpenAI) -> None:
    start = np.full((64, 64, 3), (255, 165, 0), np.uint8)
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[:, 32:, 3] = 0  # transparent is drawn anew
    got = client.images.edit(image=png(start), mask=png(mask), prompt="a cat", extra_body={"seed": 7})
    assert got.data is not None and got.data[0].b64_json
    drawn = pixels_of(got.data[0].b64_json)
    assert np.array_equal(drawn[:, :32], start[:, :32]) and not np.array_equal(drawn[:, 32:], start[:, 32:])


def test_openais_client_edits_a_list_of_one(client: openai.OpenAI) -> None:
    picture = png(np.full((64, 64, 3), 90, np.uint8))
    got = client.images.edit(image=[("a.png", picture)], prompt="a cat", extra_body={"seed": 7})
    assert got.data and got.data[0].b64_json


def test_openais_client_lists_the_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError, match="no model 'flux'"):
        client.images.generate(prompt="a cat", model="flux")


def test_openais_client_raises_what_people_know(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="steps must be 1, 2 or 3, got 9") as steps:
        client.images.generate(prompt="a cat", extra_body={"steps": 9})
    with pytest.raises(openai.BadRequestError, match="size must be WIDTHxHEIGHT up to 4096") as size:
        client.images.generate(prompt="a cat", size="99999x1024")  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="response_format") as form:
        client.images.generate(prompt="a cat", response_format="file")  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="prompt") as prompt:
        client.images.generate(prompt="a" * 40_000)
    assert [one.value.param for one in (steps, size, form, prompt)] == ["steps", "size", "response_format", "prompt"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "a cat", "seed": 1, "output_format": kind}).json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).format == kind.upper()
    assert answer["steps"] == 3 and answer["size"] == "64x64" and 0 < answer["timings"]["total"] < 30


def bomb(side: int = 30_000) -> bytes:
    """A PNG of 1 kB that says it has that many pixels a side: 2.7 GB unpacked."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


GOOD = png(np.zeros((64, 64, 3), np.uint8))
BAD_UPLOADS = {
    "a bomb": ({"image": bomb()}, {"prompt": "a cat"}, 400, "more than the 16,777,216 pixels"),
    "a large picture": ({"image": bomb(5000)}, {"prompt": "a cat"}, 400, "has 5000x5000 pixels; at most 16,777,216"),
    "no picture": ({"image": b"not a picture"}, {"prompt": "a cat"}, 400, "no PNG, JPEG or WebP"),
    "half a picture": ({"image": GOOD[: len(GOOD) // 2]}, {"prompt": "a cat"}, 400, "no PNG, JPEG or WebP"),
    "a mask that is none": ({"image": GOOD, "mask": b"x"}, {"prompt": "a cat"}, 400, "mask is no PNG"),
    "no image": ({}, {"prompt": "a cat"}, 400, "image: exactly one picture is drawn from, got 0"),
    "an unknown field": ({"image": GOOD}, {"prompt": "a cat", "sead": "1"}, 400, "sead: there is no such field"),
    "text as an image": ({}, {"prompt": "a cat", "image": "fox.png"}, 400, "image: send a file"),
    "two images": (
        [("image[]", GOOD), ("image[]", GOOD)],
        {"prompt": "a cat"},
        400,
        "exactly one picture is drawn from, got 2",
    ),
    "no prompt": ({"image": GOOD}, {}, 400, "prompt"),
    "strength": ({"image": GOOD}, {"prompt": "a cat", "strength": "2"}, 400, "strength"),
    "too much": ({"image": bytes(21_000_000)}, {"prompt": "a cat"}, 413, "more than 20,000,000 bytes"),
}


@pytest.mark.parametrize("case", BAD_UPLOADS.values(), ids=BAD_UPLOADS)
def test_uploads_that_are_refused(http: httpx.Client, case) -> None:
    files, data, status, says = case
    uploads = list(files.items()) if isinstance(files, dict) else files
    form = [*uploads, *((name, (None, value)) for name, value in data.items())]
    answer = http.post("/v1/images/edits", files=form)
    assert answer.status_code == status and says in answer.json()["error"]["message"], answer.text


def test_an_edit_in_json_is_told_to_be_a_form(http: httpx.Client) -> None:
    """It was told that the prompt, which it had, is required."""
    for sent in ({"json": {"prompt": "a cat"}}, {"content": b"a cat"}):
        answer = http.post("/v1/images/edits", **sent)  # type: ignore[arg-type]
        said = answer.json()["error"]["message"]
        assert answer.status_code == 400 and said.startswith(
            "send a form, with the content-type multipart/form-data"
        ), said
    assert http.post("/v1/images/edits", data={"n": "1"}).json()["error"]["param"] == "prompt"


BODIES = {
    "no JSON": (b"{", "the body is no JSON"),
    "a list": (b"[]", "send a JSON object, with the content-type application/json"),
    "nothing": (b"", "send a JSON object"),
    "broken UTF-8": (b'{"prompt": "\xff\xfe"}', ""),
    "a number": (b'{"prompt": 3}', "prompt"),
    "an unknown field": (b'{"prompt": "a", "promt": "b"}', "promt"),
    "too many": (b'{"prompt": "a", "n": 65}', "n: Input should be less than or equal to 64, got '65'"),
    "a huge number": (b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}", "seed"),
    "deeply nested": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
    "a bad size": (b'{"prompt": "a", "size": "big"}', "size must be WIDTHxHEIGHT"),
    "an empty prompt": (b'{"prompt": " "}', "prompt must be"),
    "far too long a prompt": (json.dumps({"prompt": "a" * 33_000}).encode(), "prompt"),
    "half a character": (b'{"prompt": "a \\ud800 cat"}', "prompt"),
    "NaN": (b'{"prompt": "a", "seed": NaN}', ""),
    "a seed beyond the last": (b'{"prompt": "a", "n": 2, "seed": 9223372036854775807}', "seed must be at most"),
}


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES)
def test_bodies_that_are_refused(http: httpx.Client, case) -> None:
    body, says = case
    answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_sizes_lies_and_strangers(http: httpx.Client, server) -> None:
    huge = http.post("/v1/images/generations", content=b" " * 70_000)
    assert huge.status_code == 413 and "65,536" in huge.json()["error"]["message"]
    chunks = http.post("/v1/images/generations", content=(b" " * 10_000 for _ in range(10)))  # no content-length
    assert chunks.status_code == 413
    other = http.post("/v1/images/generations", json={"prompt": "a cat"}, headers={"origin": "https://evil.example"})
    assert other.status_code == 403
    same = http.post("/v1/images/generations", json={"prompt": "a cat"}, headers={"origin": server.url})
    assert same.status_code == 200 and "access-control-allow-origin" not in same.headers
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/v1/images/generations").status_code == 405
    with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
        raw.sendall(b"\x00\xff\x00 rubbish\r\n\r\n")
        assert b" 400 " in raw.recv(1000)
    assert http.get("/page/../app.py").status_code == 404 and http.get("/page/%2e%2e/app.py").status_code == 404
    assert http.get("/healthz").text == "ok" and http.get("/readyz").text == "ready"
    assert [http.head(path).status_code for path in ("/", "/healthz", "/readyz")] == [200, 200, 200]


def test_what_prometheus_reads(http: httpx.Client) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {
            sample.name + str(sample.labels.get("stage", "")): sample.value for f in families for sample in f.samples
        }

    before = read()
    assert http.post("/v1/images/generations", json={"prompt": "a dog", "n": 2}).status_code == 200
    after = read()
    assert after["imagine_flash_pictures_total"] - before.get("imagine_flash_pictures_total", 0) == 2
    for name in ("stage_seconds_countdenoise", "batch_pictures_count", "cache_misses_total"):
        assert after[f"imagine_flash_{name}"] >= 1
    assert after["imagine_flash_waiting_pictures"] == 0 and after["imagine_flash_ready"] == 1


def test_many_at_once_are_neither_lost_nor_mixed(server) -> None:
    with httpx.Client(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=16)) as http:

        def draw(seed: int) -> bytes:
            body = {"prompt": "a cat", "seed": seed % 8, "steps": 1 + seed % 3}
            for _ in range(200):  # a full queue says 429 and when to come again
                answer = http.post("/v1/images/generations", json=body)
                if answer.status_code != 429:
                    break
                assert float(answer.headers["retry-after"]) >= 1
            assert answer.status_code == 200, answer.text
            return base64.b64decode(answer.json()["data"][0]["b64_json"])

        alone = {key: pixels_of(draw(key)) for key in range(24)}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for key, data in enumerate(pool.map(draw, range(96))):
                assert np.abs(pixels_of(data) - alone[key % 24]).max() <= 1
