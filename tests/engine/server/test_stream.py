"""The WebSocket of a real server process: the newest text wins, and nothing that a client sends stops the server."""

import io
import json
import random
import re
import struct
import time
from contextlib import ExitStack
from socket import SHUT_RDWR

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from imagine_flash.engine import Engine, GenerateRequest


def open_stream(server, **options) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{server.port}/v1/stream", **options)


def ask(socket: ClientConnection, seq: int, prompt: str = "a cat", **values) -> None:
    socket.send(json.dumps({"seq": seq, "prompt": prompt, "format": "png", **values}))


def read(socket: ClientConnection, seconds: float = 20) -> tuple[dict, np.ndarray | None]:
    """The next message: its header and, of a picture, the pixels."""
    message = socket.recv(timeout=seconds)
    if isinstance(message, str):
        return json.loads(message), None
    (length,) = struct.unpack(">I", message[:4])
    header, data = json.loads(message[4 : 4 + length]), message[4 + length :]
    assert len(data) == header["bytes"]
    return header, np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def stream(server):
    with open_stream(server) as socket:
        ready, _ = read(socket)
        assert ready["type"] == "ready" and ready["steps"] == [1, 2, 3] and ready["sizes"] == ["64x64"]
        yield socket


def test_a_picture_with_its_header(stream: ClientConnection, tiny_artifact) -> None:
    ask(stream, 5, "a cat on zebra", seed=7, steps=2)
    header, pixels = read(stream)
    assert (header["seq"], header["seed"], header["steps"], header["size"]) == (5, 7, 2, "64x64")
    assert header["unknown_words"] == ["zebra"] and not header["preview"]
    assert 0 < header["timings"]["denoise"] < header["timings"]["total"]
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        expected = engine.generate(GenerateRequest(prompt="a cat on zebra", seed=7, steps=2)).images[0]
    assert pixels is not None and np.abs(pixels.astype(int) - expected).max() <= 1


def test_typing_ends_with_the_last_text_and_never_goes_back(stream: ClientConnection) -> None:
    text = "a fox on a pink background"
    for i in range(1, len(text) + 1):
        ask(stream, i, text[:i] if text[:i].strip() else "a", seed=7)
    seen = []
    while not seen or seen[-1] < len(text):
        header, _ = read(stream)
        seen.append(header["seq"])
    assert seen == sorted(seen) and len(set(seen)) == len(seen)


def test_the_preview_comes_first(stream: ClientConnection) -> None:
    """A reader may be too slow for one, not for every one."""
    previews = 0
    for seq in range(1, 30):
        ask(stream, seq, preview=True, seed=7)
        header = read(stream)[0]
        if header["preview"]:
            assert (header["seq"], header["steps"]) == (seq, 1)
            previews += 1
            header = read(stream)[0]
        assert (header["seq"], header["steps"], header["preview"]) == (seq, 3, False)
    assert previews


BAD = [
    ("{", "no JSON"),
    ("[]", "dictionary"),
    ('{"prompt": "a"}', "seq"),
    ('{"seq": 0, "prompt": "a"}', "seq"),
    ('{"seq": "1", "prompt": "a"}', "seq"),
    ('{"seq": 1e99, "prompt": "a"}', "seq"),
    ('{"seq": 1, "prompt": ""}', "prompt"),
    ('{"seq": 1, "prompt": "   "}', "prompt must be"),
    ('{"seq": 1, "prompt": "a", "steps": 7}', "steps must be 1, 2 or 3, got 7"),
    ('{"seq": 1, "prompt": "a", "size": "8x8"}', "draws 64x64"),
    ('{"seq": 1, "prompt": "a", "format": "gif"}', "format"),
    ('{"seq": 1, "prompt": "a", "sead": 3}', "sead"),
    ("[" * 30_000, "no JSON"),
    ("nul\x00l", "no JSON"),
]


@pytest.mark.parametrize(("text", "says"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_answered_and_the_stream_goes_on(stream: ClientConnection, text: str, says: str) -> None:
    stream.send(text)
    header, _ = read(stream)
    assert header["type"] == "error" and says in header["error"]["message"], header
    ask(stream, 1)
    assert read(stream)[0]["seq"] == 1
    ask(stream, 1)
    assert "seq must be above 1" in read(stream)[0]["error"]["message"]


def test_it_draws_from_the_picture_that_was_sent_last(stream: ClientConnection, tiny_artifact) -> None:
    ask(stream, 1, strength=0.5)
    assert "strength needs a picture" in read(stream)[0]["error"]["message"]
    stream.send(b"\x00\x01")
    ask(stream, 2, strength=0.5)
    assert "image is no PNG" in read(stream)[0]["error"]["message"]
    start = np.full((64, 64, 3), (255, 165, 0), np.uint8)
    file = io.BytesIO()
    Image.fromarray(start).save(file, "PNG")
    stream.send(file.getvalue())
    ask(stream, 3, strength=0.5, seed=7)
    header, pixels = read(stream)
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        expected = engine.generate(GenerateRequest(prompt="a cat", seed=7, image=start, strength=0.5)).images[0]
    assert header["seq"] == 3 and pixels is not None and np.abs(pixels.astype(int) - expected).max() <= 1
    stream.send('{"type":"ping"}')
    assert read(stream) == ({"type": "pong"}, None)
    ask(stream, 4, seed=7)  # without a strength, from the text alone
    header, pixels = read(stream)
    assert header["seq"] == 4 and pixels is not None and np.abs(pixels.astype(int) - expected).max() > 1


def test_guidance_of_a_model_made_without_is_ignored_and_named(stream: ClientConnection) -> None:
    """It was drawn with, though HTTP ignored it."""
    ask(stream, 1, seed=7)
    plain, pixels = read(stream)
    ask(stream, 2, seed=7, guidance_scale=5, negative_prompt="a dog")
    header, same = read(stream)
    assert plain["ignored"] == [] and header["ignored"] == ["guidance_scale", "negative_prompt"]
    assert pixels is not None and same is not None and np.array_equal(pixels, same)


def test_a_ping_is_json_like_any_other(server, stream: ClientConnection) -> None:
    """One with spaces was told that it has no seq."""
    stream.send('{ "type": "ping" }')
    assert read(stream) == ({"type": "pong"}, None)
    answer = httpx.get(f"{server.url}/v1/stream")
    assert answer.status_code == 426 and answer.headers["upgrade"] == "websocket"
    assert "this is a WebSocket" in answer.json()["error"]["message"]


def test_messages_that_are_too_long_close_it(server) -> None:
    for message, code in ((bytes(300_000), 1009), ("x" * 70_000, 1009)):
        with open_stream(server) as socket:
            read(socket)
            socket.send(message)
            with pytest.raises(ConnectionClosed) as closed:
                read(socket)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == code
    with open_stream(server) as socket:
        assert read(socket)[0]["type"] == "ready"


def test_text_that_is_no_utf8_closes_it_in_one_line_of_the_log(server) -> None:
    with open_stream(server) as socket:
        read(socket)
        socket.send(b"{\xff}", text=True)
        with pytest.raises(ConnectionClosed) as closed:
            read(socket)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1007
    log = server.log.read_text()
    assert "Invalid UTF-8" in log and "Traceback" not in log


def test_bytes_count_not_characters(server) -> None:
    with open_stream(server) as socket:
        read(socket)
        socket.send("é" * 40_000)
        with pytest.raises(ConnectionClosed) as closed:
            read(socket)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_what_was_refused_changes_nothing_for_what_was_taken(stream: ClientConnection) -> None:
    for seq in range(1, 6):
        ask(stream, seq, format="jpeg", seed=None)
        ask(stream, seq, format="webp", preview=True)
        found = [read(stream)[0], read(stream)[0]]
        assert sorted(one["type"] for one in found) == ["error", "image"]
        (image,) = (one for one in found if one["type"] == "image")
        assert image["format"] == "jpeg" and image["seed"] == 0 and not image["preview"]


def test_a_picture_is_a_jpeg_where_nothing_is_said(stream: ClientConnection) -> None:
    stream.send(json.dumps({"seq": 1, "prompt": "a cat"}))
    message = stream.recv(timeout=20)
    assert isinstance(message, bytes) and b"\xff\xd8\xff" in message
    (length,) = struct.unpack(">I", message[:4])
    assert json.loads(message[4 : 4 + length])["format"] == "jpeg"


def test_every_picture_of_a_flood_has_the_format_that_was_asked_for(server) -> None:
    with httpx.Client(base_url=server.url) as http, open_stream(server) as socket:
        read(socket)
        before = stale(http)
        for seq in range(1, 301):
            ask(socket, seq, f"a cat {seq % 7}")
            time.sleep(0.002)
        formats, seq = set(), 0
        while seq < 300:
            header, _ = read(socket)
            seq = header["seq"]
            formats.add(header["format"])
        assert formats == {"png"}
        assert stale(http) > before, "counted while the socket is open"


def stale(http: httpx.Client) -> float:
    (line,) = (line for line in http.get("/metrics").text.splitlines() if line.startswith("imagine_flash_stale_total"))
    return float(line.split()[1])


def test_open_sockets_are_counted_and_closing_makes_nothing_stale(server) -> None:
    def read_metrics() -> dict[str, float]:
        text = http.get("/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(\S+) ([\d.e+-]+)$", text, re.MULTILINE)}

    with httpx.Client(base_url=server.url) as http:
        limit = time.monotonic() + 20
        while (before := read_metrics())["imagine_flash_sessions"]:  # of tests before
            assert time.monotonic() < limit
        with ExitStack() as opened:
            for _ in range(5):
                socket = opened.enter_context(open_stream(server))
                read(socket)
                ask(socket, 1, "a cat")
            during = read_metrics()
        assert during["imagine_flash_sessions"] == 5
        limit = time.monotonic() + 20
        while (after := read_metrics())["imagine_flash_sessions"]:
            assert time.monotonic() < limit
        assert after["imagine_flash_stale_total"] == before["imagine_flash_stale_total"]


def test_pictures_are_not_compressed_twice(server) -> None:
    """WebP, JPEG and PNG only grow by permessage-deflate, which every browser offers, and it takes the event loop's time."""
    with connect(server.url.replace("http", "ws") + "/v1/stream", compression="deflate") as socket:
        assert not socket.protocol.extensions


def test_pages_of_other_hosts_are_refused(server) -> None:
    with pytest.raises(InvalidStatus) as refused:
        open_stream(server, origin="https://evil.example")
    assert refused.value.response.status_code == 403
    with open_stream(server, origin=server.url) as socket:
        assert read(socket)[0]["type"] == "ready"


def test_a_closed_socket_leaves_nothing_behind(server) -> None:
    rng = random.Random(0)
    for _ in range(30):
        with open_stream(server, close_timeout=0.1) as socket:  # older clients wait so long for the socket that is gone
            for seq in range(1, rng.randrange(2, 6)):
                ask(socket, seq, rng.choice(["a cat", "a dog", "a fox on pink"]))
            time.sleep(rng.random() * 0.02)
            if rng.random() < 0.5:
                socket.socket.shutdown(SHUT_RDWR)  # without a goodbye
    with httpx.Client(base_url=server.url) as http:
        limit = time.monotonic() + 20
        while "imagine_flash_waiting_pictures 0.0" not in http.get("/metrics").text:
            assert time.monotonic() < limit, "work of closed sockets goes on"
            time.sleep(0.05)


def test_no_more_streams_than_may_be_open(tiny_artifact) -> None:
    """The next one is told so and may try again."""
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

    from imagine_flash.engine.server import create_app
    from imagine_flash.engine.server.settings import ServerSettings

    engine = Engine.load(tiny_artifact, backend="onnxruntime")
    client = TestClient(create_app(engine, ServerSettings(max_streams=1)), base_url="http://localhost")
    with engine, client.websocket_connect("/v1/stream") as first:
        assert first.receive_json()["type"] == "ready"
        assert "imagine_flash_sessions 1.0" in client.get("/metrics").text
        with client.websocket_connect("/v1/stream") as second, pytest.raises(WebSocketDisconnect) as refused:
            second.receive_json()
        assert refused.value.code == 1013 and "at most 1 may be" in refused.value.reason
