"""What stands in Ray's proxies, and how replicas are laid out, without a Ray."""

import asyncio
import json
from collections.abc import Callable
from functools import partial

import pytest

from imagine_flash.core.errors import RequestError
from imagine_flash.engine.server import ray_proxy
from imagine_flash.engine.server.guard import Guard
from imagine_flash.engine.server.ray_proxy import SecondTry
from imagine_flash.engine.server.ray_run import placement
from imagine_flash.engine.server.settings import RaySettings, ServerSettings

UPLOAD = {"path": "/v1/images/edits", "headers": {"content-type": "multipart/form-data; boundary=x"}}


def ask(
    app, path: str = "/v1/images/generations", body: bytes = b"{}", headers=None, stalls=False, over: Callable = SecondTry
) -> list[dict]:  # fmt: skip
    """What `SecondTry` over an application sends to somebody who waits; stalls: who sends half a body and no more."""
    sent: list[dict] = []

    async def asked() -> None:
        parts = [{"type": "http.request", "body": body, "more_body": stalls}]

        async def receive() -> dict:
            if not parts:
                await asyncio.sleep(60)
            return parts.pop()

        async def send(message) -> None:
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        await over(app)({"type": "http", "method": "POST", "path": path, "headers": raw}, receive, send)

    asyncio.run(asked())
    return sent


def dying(times: int, after: int = 0):
    """A replica that reads the request, and the first times ends after so many messages of its answer."""
    seen: list[bytes] = []

    async def app(scope, receive, send) -> None:
        seen.append((await receive())["body"])
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

    assert ask(ray)[0]["status"] == 503 and ask(ray, "/-/routes")[0]["status"] == 404


@pytest.mark.parametrize(
    ("asked", "most"),
    [({}, 65_536), ({"path": "/v1/images/edits"}, 65_536), ({"path": "/"}, 65_536), (UPLOAD, 20_000_000)],
)
def test_too_large_a_body_is_refused_before_a_replica_is_asked(asked: dict, most: int) -> None:
    app, seen = dying(times=0)
    assert ask(app, body=bytes(most), **asked)[0]["status"] == 200 and len(seen) == 1
    assert ask(app, body=bytes(most + 1), **asked)[0]["status"] == 413 and len(seen) == 1
    for announced, status in ((most, 200), (most + 1, 413)):  # of which nothing is read
        headers = {**asked.get("headers", {}), "content-length": str(announced)}
        for over in (SecondTry, partial(Guard, settings=ServerSettings())):
            assert (
                ask(app, asked.get("path", "/v1/images/generations"), headers=headers, over=over)[0]["status"] == status
            )


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


def test_half_a_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_proxy, "MOST_SILENCE", 0.05)
    app, seen = dying(times=0)
    assert ask(app, stalls=True)[0]["status"] == 408 and not seen
