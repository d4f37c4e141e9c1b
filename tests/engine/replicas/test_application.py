"""What stands in Ray's proxies, and how replicas are laid out, without a Ray."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from imagine_flash.core.errors import EngineError, RequestError
from imagine_flash.engine.replicas import run
from imagine_flash.engine.replicas.application import Unanswered
from imagine_flash.engine.replicas.run import placement, wait_for_proxies
from imagine_flash.engine.server.settings import ServerSettings


def ask(messages: list[dict], kind: str = "http", heard: list[dict] | None = None) -> list[dict]:
    """What a client is sent where an application sends these."""
    sent: list[dict] = []
    arriving = list(heard or [])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(len(arriving)):
            await receive()
        for message in messages:
            await send(message)

    async def main() -> None:
        async def receive() -> dict:
            return arriving.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await Unanswered(app)({"type": kind, "path": "/", "headers": []}, receive, send)

    asyncio.run(main())
    return sent


def test_a_replica_that_ends_without_an_answer_is_a_503_that_says_when_to_come_again() -> None:
    """Ray says nothing then, which is a bare 500."""
    start, body = ask([])
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"])["error"]["type"] == "server_error"


def test_rays_own_503_says_when_to_come_again() -> None:
    start, _ = ask(
        [{"type": "http.response.start", "status": 503, "headers": []}, {"type": "http.response.body", "body": b""}]
    )
    assert start["headers"] == [(b"retry-after", b"1")]


def test_a_503_that_says_when_to_come_again_says_it_once() -> None:
    """Two headers are "5, 1" to httpx, which is no number."""
    headers = [(b"Retry-After", b"5"), (b"retry-after-ms", b"4200")]
    (start,) = ask([{"type": "http.response.start", "status": 503, "headers": headers}])
    assert start["headers"] == headers


def test_answers_pass_as_they_are() -> None:
    answer = [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": b"x"},
    ]
    assert ask(answer) == answer
    said = [{"type": "websocket.accept"}, {"type": "websocket.close", "code": 1009}]
    assert ask(said, "websocket") == said


def test_a_websocket_of_a_replica_that_ended_is_closed_with_service_restart() -> None:
    sent = ask([{"type": "websocket.accept"}, {"type": "websocket.send", "text": "{}"}], "websocket")
    assert sent[-1] == {"type": "websocket.close", "code": 1012}


def replicas(number: int, **further: Any) -> ServerSettings:
    return ServerSettings(ray=True, replicas=number, **further)


def test_placement() -> None:
    plain = ServerSettings(ray=True)
    two = placement({"CPU": 8.0}, 1, replicas(2))
    assert two == {"num_replicas": 2, "ray_actor_options": {"num_cpus": 4, "num_gpus": 0}}
    assert placement({"CPU": 2.0, "GPU": 4.0}, 1, replicas(4))["ray_actor_options"]["num_cpus"] == 0.5
    assert placement({"CPU": 8.0}, 1, replicas(2, threads=1))["ray_actor_options"]["num_cpus"] == 1
    scaled = placement({"CPU": 32.0, "GPU": 4.0}, 2, plain)
    assert scaled["autoscaling_config"]["max_replicas"] == 4
    assert scaled["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 1}
    on_cpu = placement({"CPU": 32.0, "GPU": 4.0}, 2, ServerSettings(device="cpu"))
    assert on_cpu["autoscaling_config"]["max_replicas"] == 2
    with pytest.raises(RequestError, match="--replicas 5 need a GPU each; Ray has 4"):
        placement({"CPU": 32.0, "GPU": 4.0}, 2, replicas(5))
    with pytest.raises(RequestError, match="--replicas 64 need a processor each; Ray has 2"):
        placement({"CPU": 2.0}, 1, replicas(64))


def test_proxies_that_are_late_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ProxyStatus, ServeStatus

    states = [{}, {"a": ProxyStatus.UNHEALTHY}, {"a": ProxyStatus.STARTING}, {"a": ProxyStatus.HEALTHY}]
    monkeypatch.setattr(run.time, "sleep", lambda _: None)
    monkeypatch.setattr(run.serve, "status", lambda: ServeStatus(proxies=states.pop(0)))
    wait_for_proxies(60)
    assert not states
    monkeypatch.setattr(run.serve, "status", lambda: ServeStatus(proxies={"a": ProxyStatus.STARTING}))
    with pytest.raises(EngineError, match=r"do not start within 60 s \(starting\): is the machine overloaded"):
        wait_for_proxies(0)
