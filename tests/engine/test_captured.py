"""What a CUDA graph does, emulated without a GPU: the recorded operations run again on the very same arrays.

An input that is not written before a replay is poisoned, so a stale one shows in the picture.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.torch import TorchBackend, load_student
from imagine_flash.engine.backends.torch_modes import Captured
from imagine_flash.engine.reference import reference_generate
from imagine_flash.pipelines.loading import load_stages


def tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Remembers every operation with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            read = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs))}
            for static, new in zip(tensors(out), tensors(again), strict=True):
                if static.untyped_storage().data_ptr() not in read:  # neither a view nor in place
                    static.copy_(new)


def emulate(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    recorder = Recorder()
    with recorder:
        outputs = call()
    return recorder.replay, outputs


def poison_after(run: Captured) -> Callable[[], None]:
    """The run's replay; whatever its inputs held is gone afterwards."""
    replay = run._replay

    def replay_and_poison() -> None:
        replay()
        for values in run.inputs:
            values.fill_(torch.nan if values.is_floating_point() else 1)

    return replay_and_poison


@pytest.fixture(scope="module")
def engine(tiny_student: Path) -> Iterator[Any]:
    """Its backend captures by emulation, and every graph of it is poisoned."""
    _, tokenizer, model = load_student(tiny_student, "torch", BackendOptions(device="cpu", precision="fp32"), None)
    patched = pytest.MonkeyPatch()  # the interpreter's kernels are no operations of torch, and would not be recorded
    patched.setattr("imagine_flash.kernels.group_norm_silu.runs_kernel", lambda x: False)
    stages = load_stages(tiny_student, dtype=torch.float32)
    backend = TorchBackend(
        tiny_student, model, stages, torch.device("cpu"), name="torch-graph", batches=(1, 2, 4), capture=emulate
    )
    backend.prepare(("text_encoder", "denoiser", "decoder"), (1, 2, 4))
    for run in backend._graphs.values():
        assert isinstance(run, Captured), "every stage is captured"
        run._replay = poison_after(run)
    with Engine(backend, tokenizer, model, max_batch=4) as made:
        yield made
    patched.undo()


@pytest.fixture(scope="module")
def plain(tiny_student: Path) -> Iterator[Engine]:
    with Engine.load(tiny_student, backend="torch", device="cpu", precision="fp32") as engine:
        yield engine


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (3, 1), (3, 2), (2, 3)])
def test_replays_draw_what_eager_calls_draw(engine, plain: Engine, steps: int, count: int) -> None:
    """Padded batches among them: three pictures run as four."""
    request = GenerateRequest(prompt="a cat on pink", seed=5, steps=steps, count=count)
    expected = plain.generate(request).images
    for _ in range(2):  # the second time the prompt is known
        assert np.abs(engine.generate(request).images.astype(int) - expected).max() <= 1
    assert (
        np.abs(
            reference_generate(engine.backend, engine.tokenizer, engine.manifest, request).astype(int) - expected
        ).max()
        <= 1
    )


def test_a_negative_prompt_in_two_calls(engine, plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batch 1: the second call wrote its answer over the first's, and the negative prompt was drawn."""
    for prompt in ("a cat", "a dog"):  # known from now on
        engine.generate(GenerateRequest(prompt=prompt))
    for one in (engine.batcher, engine.batcher._calls):
        monkeypatch.setattr(one, "max_batch", 1)
    request = GenerateRequest(prompt="a cat", seed=5, steps=2, guidance=3.0, negative_prompt="a dog")
    assert np.abs(engine.generate(request).images.astype(int) - plain.generate(request).images).max() <= 1


def test_requests_at_different_steps_share_a_batch(engine, plain: Engine) -> None:
    """What the update wrote for one group is not taken for the input of another."""
    requests = [
        GenerateRequest(prompt=p, seed=i, steps=3 - i % 3) for i, p in enumerate(["a cat", "a dog", "a fox"] * 3)
    ]
    found = [drawing.result(60).images for drawing in [engine.submit(request) for request in requests]]
    for request, images in zip(requests, found, strict=True):
        assert np.abs(images.astype(int) - plain.generate(request).images).max() <= 1


def test_the_update_writes_the_next_input(engine) -> None:
    """In the network's dtype and layout, so that the next call copies no latents."""
    backend, tokenizer, model = engine.backend, engine.tokenizer, engine.manifest
    x = backend.upload(np.random.default_rng(0).standard_normal((1, *model.latent_shape), np.float32))
    assert x.is_contiguous(memory_format=torch.channels_last)
    conditions, (run, table) = (
        backend.encode(tokenizer.encode("a cat")),
        (backend._graphs["denoiser", 1], model.update_tables()[3]),
    )
    times = model.schedule.network_time(table.timesteps).astype(np.float32)
    a, b = table.a.astype(np.float32), table.b.astype(np.float32)
    m = backend.denoise(x, times[:1], conditions)
    x_s = backend.update(x, m, a[:1], b[:1])
    assert run.ready is x_s and torch.equal(run.inputs[0], x_s.to(run.inputs[0].dtype))
    assert run.inputs[0].is_contiguous(memory_format=torch.channels_last)
    counted = Recorder()
    with counted:
        backend.denoise(x_s, times[1:2], conditions)
    written = [args[0] for func, args, _, _ in counted.calls if func is torch.ops.aten.copy_.default]
    assert not any(one.data_ptr() == run.inputs[0].data_ptr() for one in written if one.shape == run.inputs[0].shape)
    other = backend.update(x_s, backend.denoise(x, times[:1], conditions), a[:1], b[:1])
    assert run.ready is other, "another call in between makes the old one stale"


def test_a_cached_prompt_at_one_step_takes_few_operations(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host launches beside the replays: at most 12, of which each is a copy or the update."""
    backend, tokenizer, model = engine.backend, engine.tokenizer, engine.manifest
    conditions, table = backend.encode(tokenizer.encode("a cat")), model.update_tables()[1]
    time = model.schedule.network_time(table.timesteps).astype(np.float32)
    monkeypatch.setattr("imagine_flash.kernels.update.run", lambda *arguments: None)  # one launch
    for run in backend._graphs.values():
        monkeypatch.setattr(run, "_replay", lambda: None)  # two launches
    counted = Recorder()
    with counted:
        x = backend.upload(np.zeros((1, *model.latent_shape), np.float32))
        x = backend.update(
            x, backend.denoise(x, time, conditions), table.a.astype(np.float32), table.b.astype(np.float32)
        )
        backend.decode(x)
    views = (
        "view",
        "slice",
        "select",
        "as_strided",
        "detach",
        "alias",
        "expand",
        "unsqueeze",
        "empty",
        "lift_fresh",
        "aten.to.",
        "resolve",
    )
    launches = [str(func) for func, *_ in counted.calls if not any(view in str(func) for view in views)]
    assert len(launches) + 3 + 2 <= 12, launches  # the pictures and whether they are finite are copied to the host
