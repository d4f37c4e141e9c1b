"""Concurrent requests share network calls, and none of them notices the others."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.core.errors import ArtifactError, BusyError, EngineError, RequestError
from imagine_flash.engine import Engine
from imagine_flash.engine.backends.onnxruntime import OnnxruntimeBackend
from imagine_flash.tests.engine.gate import Gate, ask, likeness


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest, tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend=request.param) as engine:
        yield engine


def test_requests_at_different_steps_and_plans_share_calls(engine: Engine) -> None:
    requests = [ask("a cat", seed=1), ask("a dog", seed=2, steps=2), ask("a fox on pink", seed=3, steps=1)]
    alone = [engine.generate(request).images for request in requests]
    gate = Gate(engine)
    first = engine.submit(requests[0])
    assert gate.entered.wait(20)
    others = [engine.submit(request) for request in requests[1:]]
    gate.open.set()
    together = [future.result(20).images for future in (first, *others)]
    assert gate.calls == [1, 3, 2], "they join at the next step and leave when they are drawn"
    assert all(likeness(a, b) <= 1 for a, b in zip(alone, together, strict=True))


def test_the_prompts_of_newcomers_are_encoded_together(engine: Engine) -> None:
    denoise, encode = Gate(engine), Gate(engine, "encode")
    encode.open.set()
    first = engine.submit(ask("a cat"))
    assert denoise.entered.wait(20)
    others = [engine.submit(ask(prompt, seed=9)) for prompt in ("a dog", "a fox", "a cat")]
    denoise.open.set()
    got = [future.result(20) for future in (first, *others)]
    assert encode.calls == [1, 2] and [result.cached for result in got] == [False, False, False, True]
    assert likeness(got[1].images, engine.generate(ask("a dog", seed=9)).images) <= 1


def test_a_large_request_goes_in_chunks_and_a_small_one_is_not_behind_all_of_them(engine: Engine) -> None:
    gate = Gate(engine)
    large = engine.submit(ask(count=10, steps=1))
    assert gate.entered.wait(20)
    small = engine.submit(ask("a dog", steps=1, timeout=20))  # its deadline is the earlier one
    order: list[str] = []
    large.add_done_callback(lambda _: order.append("large"))
    small.add_done_callback(lambda _: order.append("small"))
    gate.open.set()
    assert large.result(20).images.shape[0] == 10 and small.result(20)
    assert order == ["small", "large"] and gate.calls[0] == 3 and sum(gate.calls) == 11


@pytest.mark.parametrize(("stage", "calls", "cancelled"), [("encode", [1], 1), ("denoise", [1], 1), ("decode", [], 0)])
def test_cancelling_stops_before_the_next_call(engine: Engine, stage: str, calls: list[int], cancelled: int) -> None:
    gate, later = Gate(engine, stage), {"encode": "denoise", "denoise": "decode", "decode": "encode"}[stage]
    following = Gate(engine, later)
    following.open.set()
    future = engine.submit(ask("a new prompt", steps=1))
    assert gate.entered.wait(20)
    before = len(following.calls)
    assert future.cancel()
    gate.open.set()
    other = engine.generate(ask("a new prompt", steps=1, seed=8))  # the same prompt: no encoder when it is known
    assert other.images.shape == (1, 64, 64, 3)
    assert following.calls[before:] == calls, "the cancelled request went on"
    assert future.cancelled() and engine.batcher.counts["cancelled"] == cancelled and engine.batcher.waiting == 0


def test_what_waits_may_expire_and_may_be_too_much(tiny_artifact: Path) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=4) as engine:
        gate = Gate(engine)
        first = engine.submit(ask(count=2))
        assert gate.entered.wait(20)
        late = engine.submit(ask(timeout=0.05))
        with pytest.raises(BusyError, match="3 pictures wait already, at most 4 may"):
            engine.submit(ask(count=2))
        time.sleep(0.06)
        gate.open.set()
        with pytest.raises(EngineError, match=r"not drawn within its 0\.05 s"):
            late.result(20)
        assert first.result(20).images.shape[0] == 2
        assert engine.generate(ask(count=4)).images.shape[0] == 4
        with pytest.raises(RequestError, match="20 pictures at once, at most 4 may wait here"):
            engine.submit(ask(count=20))


def test_the_cancelled_keep_nobody_out(tiny_artifact: Path) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=4) as engine:
        gate = Gate(engine)
        futures = [engine.submit(ask(seed=0))]
        assert gate.entered.wait(20)
        for seed in range(1, 20):
            futures.append(engine.submit(ask(seed=seed)))
            futures[seed - 1].cancel()
        others = [engine.submit(ask(seed=seed)) for seed in range(3)]
        with pytest.raises(BusyError, match="4 pictures wait already"):
            engine.submit(ask())
        gate.open.set()
        assert all(future.result(20) for future in (futures[-1], *others))
        assert engine.batcher.counts["cancelled"] == 19 and engine.batcher.waiting == 0


def test_waiting_is_called_queue(engine: Engine) -> None:
    """Before the first call and between the others, so that the stages make up the total."""
    gate = Gate(engine)
    first = engine.submit(ask())
    assert gate.entered.wait(20)
    futures = [first, *(engine.submit(ask(seed=seed)) for seed in range(5))]
    time.sleep(0.3)
    gate.open.set()
    timings = [future.result(30).timings for future in futures]
    for found in timings:
        assert sum(found.stages().values()) == pytest.approx(2 * found.total)  # total is one of them
    assert timings[0].denoise[0] >= 0.3 and min(one.queue for one in timings[1:]) >= 0.3


def test_after_close_nothing_hangs(tiny_artifact: Path) -> None:
    engine = Engine.load(tiny_artifact, backend="onnxruntime")
    gate = Gate(engine)
    running = engine.submit(ask())
    assert gate.entered.wait(20)
    waiting = engine.submit(ask())
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open.set()
    closer.join(20)
    for future in (running, waiting):
        with pytest.raises(EngineError, match=r"closed; load it again"):
            future.result(20)
    with pytest.raises(EngineError, match="closed"):
        engine.generate(ask())
    engine.close()  # twice is fine
    assert not engine.batcher._thread.is_alive()


def test_an_engine_that_is_forgotten_ends_its_thread(tiny_artifact: Path) -> None:
    engine = Engine.load(tiny_artifact, backend="onnxruntime")
    engine.generate(ask())
    thread = engine.batcher._thread
    del engine
    thread.join(20)
    assert not thread.is_alive()


def test_asyncio(engine: Engine) -> None:
    async def main() -> None:
        many = await asyncio.gather(*(engine.agenerate(ask(seed=seed)) for seed in range(6)))
        assert [result.seed for result in many] == list(range(6))
        preview, final = [result async for result in engine.stream(ask(seed=1))]
        assert (preview.steps, final.steps) == (1, 3) and likeness(final.images, many[1].images) <= 1
        assert [result.steps async for result in engine.stream(ask(steps=1))] == [1]
        gate = Gate(engine)
        task = asyncio.create_task(engine.agenerate(ask(seed=9)))
        await asyncio.to_thread(gate.entered.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()

    asyncio.run(main())


def test_padding_changes_nothing(tiny_artifact: Path) -> None:
    with Engine.load(tiny_artifact, backend="openvino", max_batch=3) as engine:
        engine.backend.batches = (1, 3)  # type: ignore[attr-defined]
        two = engine.generate(ask(count=2)).images
        alone = [engine.generate(ask(seed=7 + i)).images[0] for i in range(2)]
        assert likeness(two, np.stack(alone)) <= 1


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_batch": 0}, RequestError, "max_batch must be 1 to 3"),
        ({"max_batch": 5}, RequestError, "max_batch must be 1 to 3.*got 5"),
        ({"sizes": [(64, 96)]}, RequestError, r"has the sizes 64x64 \(width x height\), got 96x64"),
        ({"backend": "onnxrt"}, ArtifactError, "no backend 'onnxrt'; did you mean 'onnxruntime'"),
        ({"precision": "fp4"}, ArtifactError, "no precision 'fp4'"),
        ({"backend": "onnxruntime", "precision": "bf16"}, ArtifactError, "own precision, fp32.*--precision bf16"),
        ({"backend": "openvino", "precision": "fp16"}, ArtifactError, "computes in .*fp32.*, not fp16"),
        (
            {"backend": "openvino", "device": "cuda"},
            ArtifactError,
            "device must be auto, cpu, gpu, gpu:N or npu for .* openvino, got 'cuda'",
        ),
        ({"device": "npu"}, ArtifactError, r"OpenVINO finds no 'npu' here, only .*cpu.*; install its driver"),
        ({"backend": "openvino", "device": "gpu:1"}, ArtifactError, "OpenVINO finds no 'gpu:1' here"),
        ({"device": "directml"}, ArtifactError, "no DmlExecutionProvider.*pip install onnxruntime-directml"),
        ({"device": "coreml"}, ArtifactError, "no CoreMLExecutionProvider.*take the device cpu"),
        ({"backend": "onnxruntime", "device": "gpu"}, ArtifactError, "device must be auto, cpu, cuda.*got 'gpu'"),
        ({"device": "cuda:1"}, ArtifactError, "no CUDAExecutionProvider.*onnxruntime-gpu.*fresh environment: .*cuda]"),
    ],
)
def test_what_cannot_be_loaded(tiny_artifact: Path, values: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as found:
        Engine.load(tiny_artifact, **values)
    assert "\n" not in str(found.value)


def test_a_request_beyond_memory_is_refused_before_it_is_made(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagine_flash.engine.checks.RESULT_BYTES", 5 * 64 * 64 * 3)
    with pytest.raises(RequestError, match=r"6 pictures of 64x64 take 73,728 bytes; at most 5 at once"):
        engine.generate(ask(count=6))


def test_the_line_that_says_what_was_chosen(engine: Engine) -> None:
    assert engine.backend.name in engine.describe() and "cpu" in engine.describe() and "fp32" in engine.describe()
    assert isinstance(engine.backend, OnnxruntimeBackend) == (engine.backend.name == "onnxruntime")


def test_requests_between_two_turns_count_as_waiting(tiny_artifact: Path) -> None:
    """It happened that what had been taken from the queue and was not yet active counted nowhere, and too much was let in."""
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=2) as engine:
        entered, go, begin = threading.Event(), threading.Event(), engine.batcher._begin

        def held(arrived):
            entered.set()
            assert go.wait(20)
            return begin(arrived)

        engine.batcher._begin = held  # type: ignore[method-assign]
        first = engine.submit(ask(count=2))
        assert entered.wait(20) and engine.batcher.waiting == 2
        with pytest.raises(BusyError, match="2 pictures wait already"):
            engine.submit(ask())
        go.set()
        assert first.result(20).images.shape[0] == 2 and engine.batcher.waiting == 0


def test_a_cancelled_request_that_is_being_drawn_does_not_wait(tiny_artifact: Path) -> None:
    """Its places are free at once, so others got in, and both were counted: more than may wait seemed to."""
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=2) as engine:
        gate = Gate(engine)
        first = engine.submit(ask(count=2))
        assert gate.entered.wait(20) and engine.batcher.waiting == 2
        assert first.cancel() and engine.batcher.waiting == 0
        second = engine.submit(ask(count=2))
        assert engine.batcher.waiting == 2
        gate.open.set()
        assert len(second.result(20).images) == 2 and engine.batcher.waiting == 0


def test_no_more_than_may_wait_get_in_while_many_ask(tiny_artifact: Path) -> None:
    """Sixteen threads that ask, cancel and ask again: what waits never passes the limit, and nothing is left."""
    with Engine.load(tiny_artifact, backend="onnxruntime", max_waiting=6) as engine:
        most: list[int] = []
        end = time.monotonic() + 1.5

        def asker(seed: int) -> None:
            while time.monotonic() < end:
                try:
                    future = engine.submit(ask(seed=seed, steps=1 + seed % 3))
                except BusyError:
                    continue
                most.append(engine.batcher.waiting)
                if seed % 2:
                    future.cancel()
                else:
                    future.result(20)

        threads = [threading.Thread(target=asker, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.generate(ask())
        assert max(most) <= 6 and engine.batcher.waiting == 0
