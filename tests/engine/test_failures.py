"""A call that fails, or gives NaN, ends the request that it belongs to and no other."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine_flash.core.errors import EngineError
from imagine_flash.engine import Engine
from imagine_flash.tests.engine.gate import Gate, ask, likeness


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest, tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend=request.param) as engine:
        yield engine


def test_who_cancels_while_the_encoder_fails_is_counted_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, inner = Gate(engine, "encode"), engine.backend.encode

    def crash(tokens: Any) -> Any:
        inner(tokens)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.backend, "encode", crash)
        future = engine.submit(ask("a new prompt", steps=1))
        assert gate.entered.wait(20) and future.cancel()
        gate.open.set()
        limit = time.monotonic() + 20
        while engine.batcher.waiting:
            assert time.monotonic() < limit
            time.sleep(0.01)
    assert engine.generate(ask("a new prompt", steps=1)).images.any()  # its turn is over
    assert engine.batcher.counts["cancelled"] + engine.batcher.counts["failed"] == 1


def test_a_prompt_that_crashes_the_encoder_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    marked, inner, gate = engine.tokenizer.encode("a dog")["input_ids"], engine.backend.encode, Gate(engine)

    def crash(tokens):
        if (tokens["input_ids"] == marked).all(1).any():
            raise RuntimeError("the device is gone")
        return inner(tokens)

    first = engine.submit(ask("a fox"))
    assert gate.entered.wait(20)
    monkeypatch.setattr(engine.backend, "encode", crash)
    bad, good = engine.submit(ask("a dog")), engine.submit(ask("a cat"))  # encoded together
    gate.open.set()
    with pytest.raises(EngineError, match=r"encode.*the device is gone"):
        bad.result(20)
    assert first.result(20).images.any() and good.result(20).images.any()


def test_conditions_that_cannot_be_given_fail_their_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are joined and uploaded, where memory may end; all seven failed, and the engine counted as ready."""
    inner, gate = engine.batcher._conditioning.give, Gate(engine)

    def give(new):
        if any(chunk.job.request.seed == 666 for chunk in new):
            raise MemoryError("no room")
        inner(new)

    monkeypatch.setattr(engine.batcher._conditioning, "give", give)
    first = engine.submit(ask("a fox"))
    assert gate.entered.wait(20)
    bad, good = engine.submit(ask("a dog", seed=666)), engine.submit(ask("a cat"))
    gate.open.set()
    with pytest.raises(EngineError, match="give: no room"):
        bad.result(20)
    assert first.result(20).images.any() and good.result(20).images.any()


def test_a_fault_of_the_engines_own_counts_against_readiness(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(engine.batcher._conditioning, "unknown", lambda new: 1 / 0)
        with pytest.raises(EngineError, match="the engine failed: ZeroDivisionError"):
            engine.generate(ask())
        assert engine.batcher.failed_in_a_row == 1
    assert engine.generate(ask()).images.any() and engine.batcher.failed_in_a_row == 0


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_call_that_crashes_is_tried_again_for_each_alone(
    engine: Engine, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, limit = getattr(engine.backend, stage), [1]
    fine = engine.generate(ask()).images
    gate = Gate(engine, "encode")

    def crash(x, *others):
        if len(x) > limit[0]:
            raise RuntimeError("out of memory")
        return inner(x, *others)

    monkeypatch.setattr(engine.backend, stage, crash)
    first = engine.submit(ask("a fox"))
    assert gate.entered.wait(20)
    futures = [engine.submit(ask()) for _ in range(3)]
    gate.open.set()
    assert first.result(20) and all(likeness(future.result(20).images, fine) <= 1 for future in futures)
    limit[0] = 0
    with pytest.raises(EngineError, match=f"{stage}.*out of memory"):
        engine.generate(ask())
    assert engine.batcher.failed_in_a_row == 1
    limit[0] = 1
    assert likeness(engine.generate(ask()).images, fine) <= 1 and engine.batcher.failed_in_a_row == 0


def test_nan_fails_the_request_that_has_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, gate = engine.backend.denoise, Gate(engine)
    first = engine.submit(ask("a cat"))
    assert gate.entered.wait(20)

    def second_row_is_nan(x, timestep, conditions):
        m = np.array(inner(x, timestep, conditions))
        m[1:2, 0, 0, 0] = np.nan
        return m

    monkeypatch.setattr(engine.backend, "denoise", second_row_is_nan)
    other = engine.submit(ask("a dog"))
    gate.open.set()
    assert first.result(20).images.any()
    with pytest.raises(EngineError, match=r"denoise gave NaN.*precision fp32"):
        other.result(20)
    monkeypatch.setattr(engine.backend, "denoise", inner)
    decode = engine.backend.decode
    monkeypatch.setattr(engine.backend, "decode", lambda x: (decode(x)[0], np.zeros(len(x), bool)))
    with pytest.raises(EngineError, match="decode gave NaN"):
        engine.generate(ask())


def test_a_request_that_fails_counts_once_however_many_its_pictures(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readiness ends after a few failures in a row; one request of many pictures ended it alone."""
    assert engine.generate(ask()).images.any() and engine.batcher.failed_in_a_row == 0
    decode = engine.backend.decode
    monkeypatch.setattr(engine.backend, "decode", lambda x: (decode(x)[0], np.zeros(len(x), bool)))
    with pytest.raises(EngineError, match="decode gave NaN"):
        engine.generate(ask(count=4))
    assert engine.batcher.failed_in_a_row == 1


@pytest.mark.parametrize("stage", ["upload", "update", "denoise"])
def test_a_turn_that_failed_in_the_middle_is_tried_again_from_where_it_began(engine: Engine, stage: str) -> None:
    """It happened that x and step had changed before `upload` failed: the retry ran the step twice, and an edit that was 98
    levels wrong was delivered as a success."""
    picture = np.full((64, 64, 3), 90, np.uint8)
    mask = np.zeros((64, 64), np.float32)
    mask[16:48, 16:48] = 1
    edits = [ask(p, seed=s, image=picture, mask=mask, strength=0.9) for p, s in (("a dog", 1), ("a fox", 2))]
    expected = [engine.generate(edit).images for edit in edits]
    gate = Gate(engine)
    first = engine.submit(ask("a cat on pink"))
    assert gate.entered.wait(20)
    futures = [engine.submit(edit) for edit in edits]  # they will share calls
    inner, calls = getattr(engine.backend, stage), iter(range(100))
    after = 5 if stage == "upload" else 1  # the newcomers' own noise and masks are uploaded before their first turn

    def failing(*args):
        if next(calls) == after:
            raise RuntimeError("out of memory")
        return inner(*args)

    setattr(engine.backend, stage, failing)
    gate.open.set()
    got = [future.result(20).images for future in futures]
    assert first.result(20) and next(calls) > after, "the failure was never injected"
    assert all(likeness(a, b) <= 1 for a, b in zip(got, expected, strict=True))
