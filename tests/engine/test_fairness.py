"""Clients share the engine by weight, whatever each asks for: in closed form on the order alone, and through a real engine."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.core.errors import BusyError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.fairness import KEPT, FairShare
from imagine_flash.engine.tokenizer import Reading
from imagine_flash.engine.work import Chunk, Client, Job, Prepared
from imagine_flash.folders.sizes import Size

ALICE, BOB, CAROL = Client("alice"), Client("bob"), Client("carol", weight=2.0)


def work(client: Client, count: int, steps: int = 1, size: Size = (64, 64), **values) -> list[Chunk]:
    """A request's chunks of one picture each."""
    noise = np.zeros((count, 4, 8, 8), np.float32)
    prepared = Prepared(
        request=GenerateRequest(prompt="a cat", count=count, seed=7, **values),
        reading=Reading(text="a cat"),
        tokens={"input_ids": np.zeros((1, 8), np.int64)},
        noises=noise[:, None],
        size=size,
        steps=steps,
        tokenize=0.0,
        noise_seconds=0.0,
    )
    job = Job(prepared, default_deadline=60, client=client)
    return [Chunk(job, row, noise[row : row + 1]) for row in range(count)]


def drawn_by_turns(share: FairShare, waiting: list[Chunk]) -> Iterator[str]:
    """The clients in the order in which their pictures are drawn, one at a time."""
    while waiting:
        chunk = share.ordered(waiting)[0]
        share.begin([chunk])
        waiting.remove(chunk)
        yield chunk.job.client.name


def test_a_small_request_is_not_behind_a_large_one() -> None:
    share, waiting = FairShare(), work(ALICE, 64)
    share.arrive("alice", is_waiting=False)
    for chunk in waiting[:10]:
        share.begin([chunk])
    del waiting[:10]
    share.arrive("bob", is_waiting=False)
    waiting += work(BOB, 2)
    order = list(drawn_by_turns(share, waiting))
    assert [i for i, name in enumerate(order) if name == "bob"] == [0, 1] and len(order) == 56


def test_a_small_request_does_not_wait_for_what_has_begun() -> None:
    """It waited for all steps of the picture that was being drawn when it came, at each of its own pictures."""
    share, large = FairShare(), work(ALICE, 64, steps=3)
    share.arrive("alice", is_waiting=False)
    for begun in large[:5]:
        share.begin([begun])
        share.arrive("bob", is_waiting=False)
        (small,) = work(BOB, 1, steps=3)
        assert share.ordered([begun, *large[5:], small])[0] is small
        share.begin([small])


def test_shares_are_by_weight_whatever_is_asked_for() -> None:
    share, waiting = FairShare(), []
    for client, requests in ((ALICE, 1), (BOB, 20), (CAROL, 2)):  # of 64, 3 and 32 pictures
        share.arrive(client.name, is_waiting=False)
        for _ in range(requests):
            waiting += work(client, {"alice": 64, "bob": 3, "carol": 32}[client.name])
    turns = drawn_by_turns(share, waiting)
    first = Counter(next(turns) for _ in range(120))
    assert first == {"alice": 30, "bob": 30, "carol": 60}


def test_a_client_that_was_away_has_saved_nothing_up() -> None:
    share, waiting = FairShare(), work(ALICE, 40)
    share.arrive("alice", is_waiting=False)
    share.arrive("bob", is_waiting=False)
    share.begin(waiting[:20])
    del waiting[:20]
    share.arrive("bob", is_waiting=False)
    waiting += work(BOB, 20)
    order = list(drawn_by_turns(share, waiting))
    assert abs(Counter(order[:20])["bob"] - 10) <= 1


def test_ever_new_clients_do_not_keep_out_who_was_here_before() -> None:
    """They all began at one share, ahead of everybody who had been drawn for once."""
    share, waiting = FairShare(), list[Chunk]()

    def comes(name: str) -> None:
        share.arrive(name, is_waiting=False)
        waiting.extend(work(Client(name), 1))

    share.arrive("alice", is_waiting=False)
    share.begin(work(ALICE, 1))
    for number in range(8):
        comes(f"new {number}")
    comes("alice")
    for number in range(8, 100):
        (chunk,) = share.next_group(waiting, 1, same_steps=False)
        if chunk.job.client == ALICE:
            break
        share.begin([chunk])
        waiting.remove(chunk)
        comes(f"new {number}")
    assert number - 8 <= 18, "of two turns of all nine who wait"


def test_as_many_clients_are_remembered_as_it_says() -> None:
    share = FairShare()
    for number in range(KEPT + 100):
        share.arrive(f"client {number}", is_waiting=False)
        share.begin(work(Client(f"client {number}"), 1))
    assert KEPT <= len(share._shares) <= KEPT + 1


def test_of_one_client_the_earliest_deadline_goes_first() -> None:
    share = FairShare()
    share.arrive("alice", is_waiting=False)
    late, soon = work(ALICE, 2, timeout=50), work(ALICE, 1, timeout=5)
    assert share.ordered([*late, *soon]) == [*soon, *late]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of shares, which stands still."""
    found = [100.0]
    monkeypatch.setattr("imagine_flash.engine.fairness.time.perf_counter", lambda: found[0])
    return found


def test_calls_are_full_where_everybody_here_has_more_waiting(now: list[float]) -> None:
    """Two clients with a backlog each had calls of two pictures where four would have fitted."""
    share = FairShare()
    for client in ("alice", "bob"):
        share.arrive(client, is_waiting=False)
    group = share.next_group([*work(ALICE, 9), *work(BOB, 9)], 4, same_steps=False)
    assert Counter(chunk.job.client.name for chunk in group) == {"alice": 2, "bob": 2}
    share.arrive("carol", is_waiting=False)  # who asked for one picture a moment ago, and may ask for the next
    group = share.next_group([*work(ALICE, 9), *work(BOB, 9)], 4, same_steps=False)
    assert Counter(chunk.job.client.name for chunk in group) == {"alice": 1, "bob": 1}


@pytest.mark.parametrize(("large", "size"), [(64, (64, 64)), (8, (32, 32))])
def test_who_draws_one_at_a_time_waits_for_short_calls(now: list[float], large: int, size: Size) -> None:
    """A picture that no call of the large request could take in passed for a backlog, and waited for full calls."""
    share, waits = FairShare(), []
    share.arrive("alice", is_waiting=False)
    many = work(ALICE, large, steps=4)
    for _ in range(4):
        share.arrive("bob", is_waiting=False)
        (one,) = work(BOB, 1, steps=4, size=size)
        rows = 0
        while one in (waiting := [chunk for chunk in (*many, one) if not chunk.is_drawn]):
            group = share.next_group(waiting, 8, same_steps=False)
            share.begin([chunk for chunk in group if chunk.turn is None])
            rows += len(group)
            for chunk in group:
                chunk.step += 1
        waits.append(rows)
    assert max(waits) <= 15, waits


def test_who_is_here_is_known_from_the_last_to_ask(now: list[float]) -> None:
    share = FairShare()
    for name in ("alice", "bob", "carol", "alice"):
        share.arrive(name, is_waiting=False)
        now[0] += 0.9
    assert share.present(["dave"]) == {"dave", "alice", "carol"}


def test_a_greedy_client_lets_others_through(tiny_artifact: Path) -> None:
    """64 pictures of one client were drawn before anything of another's that had come a moment later."""
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        begun, go, inner = threading.Event(), threading.Event(), engine.backend.denoise

        def held(*given):
            begun.set()
            assert go.wait(20)
            return inner(*given)

        engine.backend.denoise = held  # type: ignore[method-assign]
        order: list[str] = []
        large = engine.submit(GenerateRequest(prompt="a cat", count=64, steps=3), client=ALICE)
        assert begun.wait(20)
        small = [engine.submit(GenerateRequest(prompt="a dog", seed=s, steps=3), client=BOB) for s in range(4)]
        for name, future in (("large", large), *(("small", future) for future in small)):
            future.add_done_callback(lambda _, name=name: order.append(name))
        drawn_before = []
        small[-1].add_done_callback(lambda _: drawn_before.append(engine.batcher.counts["pictures"]))
        go.set()
        assert large.result(60).images.shape[0] == 64
        assert order == ["small"] * 4 + ["large"] and drawn_before[0] < 32


def test_a_full_queue_has_room_for_others(tiny_artifact: Path) -> None:
    """Whoever filled the queue first kept everybody else out."""
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=8) as engine:
        begun, go, inner = threading.Event(), threading.Event(), engine.backend.denoise

        def held(*given):
            begun.set()
            assert go.wait(20)
            return inner(*given)

        engine.backend.denoise = held  # type: ignore[method-assign]
        futures = [engine.submit(GenerateRequest(prompt="a cat", count=8), client=ALICE)]
        assert begun.wait(20)
        futures += [engine.submit(GenerateRequest(prompt="a dog"), client=BOB) for _ in range(4)]
        for client in (ALICE, BOB):
            with pytest.raises(BusyError, match="12 pictures wait already, at most 8 may"):
                engine.submit(GenerateRequest(prompt="a dog"), client=client)
        futures.append(engine.submit(GenerateRequest(prompt="a dog", count=2), client=CAROL))
        go.set()
        assert all(future.result(60) for future in futures) and engine.batcher.waiting == 0


def test_pictures_are_the_same_in_company(tiny_artifact: Path) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        requests = [GenerateRequest(prompt=p, count=n, seed=3) for p, n in (("a cat", 7), ("a dog", 2), ("a fox", 1))]
        alone = [engine.generate(request).images for request in requests]
        clients = [Client(str(i)) for i in range(3)]
        futures = [engine.submit(r, client=c) for r, c in zip(requests, clients, strict=True)]
        for expected, future in zip(alone, futures, strict=True):
            assert np.abs(future.result(60).images.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("count", [3, 9])
def test_a_prompt_is_encoded_once_though_its_pictures_begin_apart(tiny_artifact: Path, count: int) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime", prompt_cache_bytes=0) as engine:
        calls, inner = [], engine.backend.encode
        engine.backend.encode = lambda tokens: calls.append(1) or inner(tokens)  # type: ignore[method-assign]
        result = engine.generate(GenerateRequest(prompt="a cat", count=count, seed=1))
        assert len(calls) == 1 and len(result.images) == count and not result.cached
