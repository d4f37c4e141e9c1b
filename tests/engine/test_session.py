"""Latest wins: whatever the interleaving, results never go backwards, nothing hangs and nothing is left behind."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagine_flash.core.errors import BusyError, EngineError, PlanError, RequestError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.session import Mailbox, Session, SessionResult
from imagine_flash.engine.work import Client


@pytest.fixture(scope="module")
def engine(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        yield engine


class Inbox:
    """Collects what a session delivers."""

    def __init__(self) -> None:
        self.found: list[SessionResult] = []
        self._arrived = threading.Condition()

    def __call__(self, result: SessionResult) -> None:
        with self._arrived:
            self.found.append(result)
            self._arrived.notify_all()

    def until(self, seq: int, *, preview: bool = False) -> SessionResult:
        def there() -> SessionResult | None:
            return next((r for r in self.found if r.seq == seq and r.preview == preview), None)

        with self._arrived:
            assert self._arrived.wait_for(lambda: there() is not None, 20), f"no result {seq}: {self.found}"
        found = there()
        assert found is not None
        return found


def ask(prompt: str = "a cat", **values) -> GenerateRequest:
    return GenerateRequest(**{"prompt": prompt, "steps": 3, "seed": 7, **values})


def hold(engine: Engine, monkeypatch: pytest.MonkeyPatch, stage: str) -> tuple[threading.Event, threading.Event]:
    entered, go = threading.Event(), threading.Event()
    inner = getattr(engine.backend, stage)

    def held(*args):
        entered.set()
        assert go.wait(20)
        return inner(*args)

    monkeypatch.setattr(engine.backend, stage, held)
    return entered, go


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_newer_request_cancels_at_the_next_boundary(
    engine: Engine, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.prompt_cache.clear()
    inbox = Inbox()
    session = Session(engine, inbox)
    entered, go = hold(engine, monkeypatch, stage)
    before = engine.batcher.counts["pictures"]
    assert session.submit(ask("a cat")) == 1
    assert entered.wait(20)
    assert [session.submit(ask(prompt)) for prompt in ("a cat on", "a cat on a", "a cat on pink")] == [2, 3, 4]
    assert session.replaced == 3 and engine.batcher.waiting == 4
    go.set()
    last = inbox.until(4)
    assert last.result is not None and np.array_equal(last.result.images, engine.generate(ask("a cat on pink")).images)
    assert [found.seq for found in inbox.found] == [4], "obsolete pictures were delivered"
    drawn = engine.batcher.counts["pictures"] - before - 1
    assert drawn == 1 + (stage == "decode"), "the one that ran is stopped at the next call, those that waited never run"


def test_after_a_while_one_older_picture_through(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typing faster than the engine draws: without it nothing would be shown until the typing stops."""
    inbox = Inbox()
    session = Session(engine, inbox, let_finish_after=0.05)
    entered, go = hold(engine, monkeypatch, "denoise")
    session.submit(ask("a cat"))
    assert entered.wait(20)
    time.sleep(0.06)
    for prompt in (
        "a cat on p",
        "a cat on pi",
        "a cat on pink",
    ):  # 1 runs and is spared; of what waits the newest is left
        session.submit(ask(prompt))
    assert session.replaced == 2
    go.set()
    inbox.until(4)
    assert [found.seq for found in inbox.found] == [1, 4]
    go.clear()
    session.submit(ask("a dog"))
    session.submit(ask("a dog on pink"))
    assert session.replaced == 3, "after a picture the time begins anew"
    go.set()
    assert inbox.until(6) and [found.seq for found in inbox.found] == [1, 4, 6]


def test_a_full_queue_keeps_no_session_from_its_newest(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one place in the queue, 2 and 3 of three keys at once were answered with "busy", and 1 was drawn."""
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=1) as engine:
        entered, go = hold(engine, monkeypatch, "denoise")
        other = engine.submit(ask("a fox"))
        assert entered.wait(20)
        inbox = Inbox()
        session = Session(engine, inbox)
        for prompt in ("a", "a cat", "a cat on pink"):
            session.submit(ask(prompt))
        with pytest.raises(BusyError, match="1 pictures wait already"):  # sessions take nobody's place
            engine.submit(ask())
        go.set()
        last = inbox.until(3)
        assert last.result is not None and [found.seq for found in inbox.found] == [3] and other.result(20)


def test_a_hundred_typists_all_see_their_last_text(tiny_artifact: Path) -> None:
    """28 of 50 last texts were refused as busy, 32 of 100 typists never saw a picture."""
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=4) as engine:
        inboxes = [Inbox() for _ in range(100)]
        sessions = [
            Session(engine, inbox, let_finish_after=0.3, client=Client(str(i % 7))) for i, inbox in enumerate(inboxes)
        ]
        text = "a fox on a pink background"
        for end in range(1, len(text) + 1):
            for session in sessions:
                session.submit(ask(text[:end] if text[:end].strip() else "a"))
        for inbox in inboxes:
            inbox.until(len(text))
            assert all(found.error is None for found in inbox.found)
        assert engine.batcher.waiting == 0


def test_the_preview_comes_first_and_only_while_it_is_the_newest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = Inbox()
    session = Session(engine, inbox, preview=True)
    session.submit(ask("a dog"))
    inbox.until(1)
    assert [(found.seq, found.preview, found.result.steps) for found in inbox.found if found.result] == [
        (1, True, 1),
        (1, False, 3),
    ]
    final, preview = inbox.until(1).result, inbox.until(1, preview=True).result
    assert final is not None and np.array_equal(final.images, engine.generate(ask("a dog")).images)
    assert preview is not None and np.array_equal(preview.images, engine.generate(ask("a dog", steps=1)).images)
    session.submit(ask("a cat", steps=1))
    assert not inbox.until(2).preview, "one step needs no preview"
    monkeypatch.setattr(session, "_deliver", lambda found: (inbox(found), found.seq == 3 and session.submit(ask("x"))))
    session.submit(ask("a fox"))
    inbox.until(4)
    assert not [found for found in inbox.found if found.seq == 3 and not found.preview], "something newer had come"
    session.close()


def test_numbers_may_be_given_but_never_go_back(engine: Engine) -> None:
    inbox = Inbox()
    session = Session(engine, inbox)
    assert session.submit(ask(), seq=10) == 10
    for seq in (10, 3, -1):
        with pytest.raises(RequestError, match=f"seq must be above 10, the newest so far, got {seq}"):
            session.submit(ask(), seq=seq)
    assert inbox.until(10).result is not None and session.submit(ask()) == 11
    inbox.until(11)


def test_a_session_takes_a_prompt_with_fields(engine: Engine) -> None:
    inbox = Inbox()
    session = Session(engine, inbox)
    arrived = inbox.until(session.submit("a cat", steps=2, seed=5))
    assert arrived.result
    assert np.array_equal(arrived.result.images, engine.generate(ask("a cat", steps=2, seed=5)).images)
    with pytest.raises(RequestError, match="a request has no 'step'"):
        session.submit("a cat", step=2)


def test_a_request_that_cannot_be_drawn_leaves_the_one_before(engine: Engine) -> None:
    inbox = Inbox()
    session = Session(engine, inbox)
    session.submit(ask())
    with pytest.raises(PlanError):
        session.submit(ask(steps=7))
    with pytest.raises(RequestError):
        session.submit(ask(width=96))
    assert inbox.until(1).result is not None and session.submit(ask()) == 2


def test_while_a_request_is_made_ready_others_come_and_are_drawn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held the session's lock, which the engine's thread needs to deliver: a long text stopped everybody's drawing."""
    inbox, refused = Inbox(), []
    session = Session(engine, inbox)
    entered, go = hold(engine, monkeypatch, "denoise")
    session.submit(ask("a cat"))
    assert entered.wait(20)
    reading, done_reading = threading.Event(), threading.Event()
    inner = engine.prepare

    def prepare(request: GenerateRequest):
        if request.prompt == "a long text":
            reading.set()
            assert done_reading.wait(20)
        return inner(request)

    def submit_a_long_text() -> None:
        with pytest.raises(RequestError, match="seq must be above 3, the newest so far, got 2") as error:
            session.submit(ask("a long text"), seq=2)
        refused.append(error.value)

    monkeypatch.setattr(engine, "prepare", prepare)
    typist = threading.Thread(target=submit_a_long_text)
    typist.start()
    assert reading.wait(20)
    go.set()
    assert inbox.until(1).result is not None and session.submit(ask("a dog"), seq=3) == 3
    done_reading.set()
    typist.join(20)
    assert len(refused) == 1, "something newer had come"
    assert inbox.until(3).result is not None and [found.seq for found in inbox.found] == [1, 3]


def test_a_failing_backend_is_an_error_with_its_number(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox()
    session = Session(engine, inbox, preview=True)

    def fail(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "denoise", fail)
        session.submit(ask())
        found = inbox.until(1)
    assert found.result is None and "no memory" in str(found.error)
    session.submit(ask())
    assert inbox.until(2).result is not None


def test_after_close_nothing_is_delivered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox()
    session = Session(engine, inbox)
    entered, go = hold(engine, monkeypatch, "denoise")
    session.submit(ask())
    assert entered.wait(20)
    session.close()
    go.set()
    engine.generate(ask("a dog"))
    assert not inbox.found and engine.batcher.waiting == 0
    with pytest.raises(EngineError, match="the session is closed"):
        session.submit(ask())


ACTION = st.tuples(st.integers(0, 2), st.sampled_from(["submit", "submit", "submit", "bad", "pause", "crash"]))


@given(
    actions=st.lists(ACTION, max_size=25),
    preview=st.booleans(),
    seed=st.integers(0, 99),
    let_finish_after=st.sampled_from([None, 0.0, 0.01]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_interleaving(
    engine: Engine, actions: list[tuple[int, str]], preview: bool, seed: int, let_finish_after: float | None
) -> None:
    """Three sessions on one engine, typed into by threads of their own, with requests refused and calls that crash."""
    rng = random.Random(seed)
    inboxes = [Inbox() for _ in range(3)]
    sessions = [Session(engine, inbox, preview=preview, let_finish_after=let_finish_after) for inbox in inboxes]
    newest, inner, crashes = [0, 0, 0], engine.backend.denoise, threading.Event()

    def denoise(*args):
        if crashes.is_set():
            crashes.clear()
            raise RuntimeError("now and then")
        return inner(*args)

    def type_into(which: int) -> None:
        for number, action in actions:
            if number != which:
                continue
            if action == "pause":
                time.sleep(rng.random() * 0.01)
            elif action == "crash":
                crashes.set()
            elif action == "bad":
                with pytest.raises(PlanError):
                    sessions[which].submit(ask(steps=9))
            else:
                newest[which] = sessions[which].submit(ask(rng.choice(["a cat", "a dog", "a fox on pink"])))

    engine.backend.denoise = denoise  # type: ignore[method-assign]
    try:
        threads = [threading.Thread(target=type_into, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        crashes.clear()
        for inbox, last in zip(inboxes, newest, strict=True):
            if last:
                inbox.until(last)  # the newest is always answered
            numbers = [found.seq for found in inbox.found]
            assert numbers == sorted(numbers), "results went backwards"
            finals = [found.seq for found in inbox.found if not found.preview]
            assert len(finals) == len(set(finals)), "a request was answered twice"
            assert all(sum(found.seq == seq for found in inbox.found) <= 2 for seq in set(numbers))
    finally:
        engine.backend.denoise = inner  # type: ignore[method-assign]
        for session in sessions:
            session.close()
    limit = time.monotonic() + 20
    while engine.batcher.waiting and time.monotonic() < limit:
        time.sleep(0.001)
    assert engine.batcher.waiting == 0, "something was left behind"
    assert engine.generate(ask()).images.any()


def test_a_mailbox_loses_nothing_unsaid_when_many_write(engine: Engine) -> None:
    """Every result was read or counted as skipped, and the last to come is read."""
    found = engine.generate(ask())

    def write(mailbox: Mailbox) -> None:
        for _ in range(2000):
            mailbox.put(found)  # type: ignore[arg-type]

    async def read(mailbox: Mailbox) -> int:
        return sum([1 async for _ in mailbox])

    async def main() -> None:
        mailbox = Mailbox()
        reading = asyncio.ensure_future(read(mailbox))
        await asyncio.gather(*(asyncio.to_thread(write, mailbox) for _ in range(8)))
        while mailbox._latest is not None:
            await asyncio.sleep(0.001)
        mailbox.close()
        assert await reading + mailbox.skipped == 8 * 2000

    asyncio.run(main())


def test_a_slow_reader_gets_the_newest_and_no_queue(engine: Engine) -> None:
    async def main() -> None:
        mailbox = Mailbox()
        session = Session(engine, mailbox.put)
        reader = mailbox.__aiter__()
        session.submit(ask("a cat"))
        assert (await anext(reader)).seq == 1
        for prompt in ("a dog", "a fox", "a dog on pink"):
            future_seq = session.submit(ask(prompt))
            while session._future is not None and not session._future.done():
                await asyncio.sleep(0.001)  # each of them is drawn while nobody reads
        while mailbox._latest is None or mailbox._latest.seq < future_seq:
            await asyncio.sleep(0.001)
        found = await anext(reader)
        assert found.seq == future_seq == 4 and mailbox.skipped == 2
        mailbox.put(found)
        mailbox.close()
        assert [found async for found in reader] == []
        session.close()

    asyncio.run(main())


def test_a_preview_that_was_drawn_is_delivered_though_its_follower_is_refused(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happened that the follower's BusyError took the preview's place."""
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        inbox, start, calls = Inbox(), engine.start, []

        def second_is_refused(prepared, **how):
            calls.append(threading.current_thread().name)
            if len(calls) == 2:
                raise BusyError("too much waits; try again later")
            return start(prepared, **how)

        monkeypatch.setattr(engine, "start", second_is_refused)
        session = Session(engine, inbox, preview=True)
        session.submit(ask())
        preview, refusal = inbox.until(1, preview=True), inbox.until(1)
        assert preview.result is not None and preview.error is None
        assert isinstance(refusal.error, BusyError) and [f.preview for f in inbox.found] == [True, False]


def test_a_reader_that_fails_at_a_preview_is_given_the_picture(engine: Engine) -> None:
    """It was drawn, and nobody was told."""
    inbox = Inbox()

    def deliver(found: SessionResult) -> None:
        inbox(found)
        if found.preview:
            raise ValueError("a reader's own fault")

    Session(engine, deliver, preview=True).submit(ask())
    assert inbox.until(1, preview=True).result is not None and inbox.until(1).result is not None


def test_nothing_is_tokenised_in_the_engines_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    inner = engine.tokenizer.encode

    def encode(text: str):
        threads.append(threading.current_thread().name)
        return inner(text)

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    inbox = Inbox()
    Session(engine, inbox, preview=True).submit(ask("a fox"))
    assert inbox.until(1).result is not None and inbox.until(1, preview=True).result is not None
    assert threads == ["MainThread"]
