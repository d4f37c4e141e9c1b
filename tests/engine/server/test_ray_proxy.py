"""What stands in Ray's proxies, and how replicas are laid out, without a Ray."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from imagine_flash.core.errors import RequestError
from imagine_flash.engine import Engine
from imagine_flash.engine.server import create_app, ray_proxy
from imagine_flash.engine.server.guard import Guard
from imagine_flash.engine.server.ray_proxy import SecondTry
from imagine_flash.engine.server.ray_run import placement
from imagine_flash.engine.server.settings import RaySettings, ServerSettings

UPLOAD = {"path": "/v1/images/edits", "headers": {"content-type": "multipart/form-data; boundary=x"}}


async def asked(app, parts: list[bytes], path="/v1/images/generations", headers=None, stalls=False) -> list[dict]:
    """What an application sends to somebody who waits; `parts` keeps what it did not read; stalls: who never ends the body."""
    sent: list[dict] = []

    async def receive() -> dict:
        if not parts:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": parts.pop(0), "more_body": stalls or bool(parts)}

    async def send(message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await app({"type": "http", "method": "POST", "path": path, "headers": raw}, receive, send)
    return sent


def ask(app, body: bytes = b"{}", **options) -> list[dict]:
    return asyncio.run(asked(SecondTry(app), [body], **options))


def dying(times: int, after: int = 0):
    """A replica that reads the request, and the first times ends after so many messages of its answer."""
    seen: list[bytes] = []

    async def app(scope, receive, send) -> None:
        seen.append(b"")
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            seen[-1] += message["body"]
            more = message["more_body"]
        marked = [(b"x-content-type-options", b"nosniff")]
        answer = [
            {"type": "http.response.start", "status": 200, "headers": marked},
            {"type": "http.response.body", "body": b"half", "more_body": True},
            {"type": "http.response.body", "body": b"whole"},
        ]
        for message in answer[:after] if len(seen) <= times else answer:
            await send(message)

    return app, seen


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_answer_that_breaks_off_is_asked_for_again(after: int) -> None:
    app, seen = dying(times=2, after=after)
    sent = ask(app, body=b"a cat")
    assert [message.get("body") for message in sent] == [None, b"half", b"whole"]
    assert seen == [b"a cat"] * 3


def test_in_the_end_it_is_a_503() -> None:
    app, seen = dying(times=9)
    start, body = ask(app)
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"] and len(seen) == 3
    assert json.loads(body["body"])["error"]["code"] == "no_replica"


def test_an_upload_ends_two_replicas_at_most() -> None:
    app, seen = dying(times=9)
    assert ask(app, **UPLOAD)[0]["status"] == 503 and len(seen) == 2


def test_what_ray_says_itself_is_a_503_but_under_its_own_paths() -> None:
    async def ray(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"Path not found"})

    assert ask(ray)[0]["status"] == 503 and ask(ray, path="/-/routes")[0]["status"] == 404


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 65_536), ({"path": "/v1/images/edits"}, 65_536), ({"path": "/"}, 65_536), (UPLOAD, 20_000_000)],
)
def test_too_large_a_body_is_refused(options: dict, most: int) -> None:
    app, _ = dying(times=0)
    assert ask(app, body=bytes(most), **options)[0]["status"] == 200
    assert ask(app, body=bytes(most + 1), **options)[0]["status"] == 413
    for announced, status in ((most, 200), (most + 1, 413)):
        headers = {**options.get("headers", {}), "content-length": str(announced)}
        unread = [b"a cat"]
        sent = asyncio.run(asked(SecondTry(Guard(app, ServerSettings())), unread, **{**options, "headers": headers}))
        assert sent[0]["status"] == status and len(unread) == (status == 413)


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_replica_that_dies_while_the_body_arrives_costs_none_of_it(reads: int) -> None:
    whole, seen = dying(times=0)
    tries = []

    async def app(scope, receive, send) -> None:
        tries.append(1)
        if len(tries) > 1:
            return await whole(scope, receive, send)
        for _ in range(reads):
            await receive()

    assert asyncio.run(asked(SecondTry(app), [b"a", b" c", b"at"]))[0]["status"] == 200
    assert seen == [b"a cat"] and len(tries) == 2


def test_the_key_is_checked_before_the_body_is_read() -> None:
    """The proxy read 20 MB of everybody before a replica saw the key."""
    unread = [bytes(65_536)] * 300
    app, seen = dying(times=0)
    guarded = Guard(app, ServerSettings(api_keys=("0123456789abcdef",)))
    sent = asyncio.run(asked(SecondTry(guarded), unread, **UPLOAD))
    assert sent[0]["status"] == 401 and len(unread) == 300 and not seen


def test_a_proxy_keeps_only_so_many_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_proxy, "MOST_KEPT", 1000)
    app, _ = dying(times=0)
    proxy = SecondTry(app)

    async def at_once() -> None:
        slow = asyncio.create_task(asked(proxy, [bytes(600)], stalls=True))
        await asyncio.sleep(0)
        assert (await asked(proxy, [bytes(400)]))[0]["status"] == 200
        refused = await asked(proxy, [bytes(401)])
        assert refused[0]["status"] == 503 and dict(refused[0]["headers"])[b"retry-after"] == b"1"
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        for _ in range(2):
            assert (await asked(proxy, [bytes(1000)]))[0]["status"] == 200

    asyncio.run(at_once())


def test_placement() -> None:
    plain = RaySettings()
    two = placement({"CPU": 8.0}, 1, plain, 2)
    assert two == {"num_replicas": 2, "ray_actor_options": {"num_cpus": 4, "num_gpus": 0}}
    assert placement({"CPU": 2.0, "GPU": 4.0}, 1, plain, 4)["ray_actor_options"]["num_cpus"] == 0.5
    assert placement({"CPU": 8.0}, 1, RaySettings(threads=1), 2)["ray_actor_options"]["num_cpus"] == 1
    scaled = placement({"CPU": 32.0, "GPU": 4.0}, 2, plain, None)
    assert scaled["autoscaling_config"]["max_replicas"] == 4
    assert scaled["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 1}
    on_cpu = placement({"CPU": 32.0, "GPU": 4.0}, 2, RaySettings(device="cpu"), None)
    assert on_cpu["autoscaling_config"]["max_replicas"] == 2
    with pytest.raises(RequestError, match="--replicas 5 need a GPU each; Ray has 4"):
        placement({"CPU": 32.0, "GPU": 4.0}, 2, plain, 5)
    with pytest.raises(RequestError, match="--replicas 64 need a processor each; Ray has 2"):
        placement({"CPU": 2.0}, 1, plain, 64)


def test_a_body_that_drips_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_proxy, "LONGEST_BODY", 0.05)
    app, seen = dying(times=0)
    assert ask(app, stalls=True)[0]["status"] == 408 and len(seen) == 1


@pytest.mark.parametrize(("given", "kept"), [("0123-abcd", True), ("short", False), ("", False)])
@pytest.mark.parametrize("status", [413, 503])
def test_errors_of_the_proxy_are_as_those_of_the_server(status: int, given: str, kept: bool) -> None:
    seen = []

    async def app(scope, receive, send) -> None:
        seen.append([value for name, value in scope["headers"] if name == b"x-request-id"])
        await receive()

    body = bytes(70_000 if status == 413 else 0)
    start, _ = ask(app, body, headers={"x-request-id": given} if given else {})
    headers = dict(start["headers"])
    assert start["status"] == status and headers[b"x-content-type-options"] == b"nosniff"
    assert (headers.get(b"retry-after") == b"1") == (status == 503)
    assert all(ids == [headers[b"x-request-id"]] for ids in seen)
    assert (headers[b"x-request-id"] == given.encode()) == kept and len(headers[b"x-request-id"]) >= 8


@pytest.fixture(scope="module")
def engine(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        yield engine


def test_half_a_body_is_not_waited_for(engine: Engine) -> None:
    app = create_app(engine, ServerSettings(timeout=0.05))
    start, body = ask(app, headers={"content-type": "application/json"}, stalls=True)
    assert start["status"] == 408 and b"0.05 seconds without the rest" in body["body"]


def test_the_real_applications_answers_pass(engine: Engine) -> None:
    """Preflights and 500 did not pass the guard, so that they were taken for Ray's own, and made a 503."""
    app = create_app(engine, ServerSettings(allowed_origins=("https://example.org",)))

    @app.get("/raises")
    async def raises() -> None:
        raise ZeroDivisionError

    origin = {"origin": "https://example.org"}
    leave = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    draw = {"prompt": "a cat", "steps": 1, "seed": 1}
    cases: list[tuple[str, str, int, dict[str, str], dict[str, Any] | None]] = [
        ("OPTIONS", "/v1/images/generations", 200, leave, None),
        ("OPTIONS", "/v1/images/generations", 400, leave | {"origin": "https://evil.example"}, None),
        ("GET", "/raises", 500, {}, None),
        ("GET", "/nowhere", 404, {}, None),
        ("GET", "/v1/images/generations", 405, {}, None),
        ("POST", "/v1/images/generations", 200, origin, draw),
        ("POST", "/v1/images/generations", 400, {}, draw | {"steps": 99}),
        ("POST", "/v1/images/generations", 403, {"origin": "https://evil.example"}, draw),
        ("GET", "/", 200, {}, None),
        ("GET", "/page/app.js", 200, {}, None),
    ]
    for method, path, status, headers, body in cases:
        plain, passed = (
            TestClient(one).request(method, path, headers=headers, json=body) for one in (app, SecondTry(app))
        )
        assert (plain.status_code, passed.status_code) == (status, status), (method, path, passed.text)
        varies = {"x-request-id": "", "content-length": ""}
        assert {**passed.headers, **varies} == {**plain.headers, **varies}
        if status != 200:
            assert passed.text == plain.text
        elif method == "OPTIONS":
            assert passed.headers["access-control-allow-origin"] == "https://example.org"
