"""What a CUDA graph does, emulated without a GPU: the recorded operations run again on the very same arrays.

An input that is not written before a replay is poisoned, and so are the outputs of all other graphs after one, so a stale one
shows in the picture. What a graph reads from outside it does not keep alive, as a CUDA graph does not.
"""

import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from imagine_flash.core.sampler import Sampler
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.torch import TorchBackend, load_student
from imagine_flash.engine.backends.torch_modes import Captured, current
from imagine_flash.engine.reference import reference_generate
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests.pipelines import describe


def tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


class Outside:
    """A tensor that a graph reads and did not make, by a weak reference."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.reference, self.shape = weakref.ref(tensor), tuple(tensor.shape)

    def tensor(self) -> torch.Tensor:
        found = self.reference()
        assert found is not None, f"the graph reads a tensor {self.shape} that was freed"
        return found


class Recorder(TorchDispatchMode):
    """Remembers every operation with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def let_go(self) -> None:
        """Of what was not made here."""
        made = {id(one) for *_, out in self.calls for one in tensors(out)}

        def weak(value: Any) -> Any:
            return Outside(value) if isinstance(value, torch.Tensor) and id(value) not in made else value

        self.calls = [(func, *tree_map(weak, (args, kwargs)), out) for func, args, kwargs, out in self.calls]

    def replay(self) -> None:
        for func, *given, out in self.calls:
            args, kwargs = tree_map(lambda value: value.tensor() if isinstance(value, Outside) else value, given)
            again = func(*args, **kwargs)
            read = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs))}
            for static, new in zip(tensors(out), tensors(again), strict=True):
                if static.untyped_storage().data_ptr() not in read:  # neither a view nor in place
                    static.copy_(new)


def make_recordable(patch: pytest.MonkeyPatch) -> None:
    """The interpreter's kernels are no operations of torch, and would not be recorded; their references are."""
    for kernel in ("group_norm_silu", "update"):
        patch.setattr(f"imagine_flash.kernels.{kernel}.runs_kernel", lambda x: False)


def emulate(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    recorder = Recorder()
    with recorder:
        outputs = call()
    recorder.let_go()
    return recorder.replay, outputs


def poison_after(run: Captured, others: Sequence[Captured]) -> Callable[[], None]:
    """The run's replay; whatever its inputs held is gone afterwards, and what the others had answered."""
    replay = run._replay

    def replay_and_poison() -> None:
        replay()
        for values in [*run.inputs, *(one for other in others for one in tensors(other._outputs))]:
            values.fill_(torch.nan if values.is_floating_point() else 1)

    return replay_and_poison


@pytest.fixture(scope="module")
def engine(tiny_student: Path) -> Iterator[Any]:
    with captured_engine(tiny_student) as made:
        yield made


@contextmanager
def captured_engine(folder: Path) -> Iterator[Any]:
    """Its backend captures by emulation, and every graph of it is poisoned."""
    _, tokenizer, model = load_student(folder, "torch", BackendOptions(device="cpu", precision="fp32"), None)
    patched = pytest.MonkeyPatch()
    make_recordable(patched)
    stages = load_stages(folder, dtype=torch.float32)
    backend = TorchBackend(
        folder, model, stages, torch.device("cpu"), name="torch-graph", batches=(1, 2, 4), capture=emulate
    )
    backend.prepare(("text_encoder", "denoiser", "decoder"), (1, 2, 4))
    runs: list[Any] = list(backend._graphs.values())
    for run in runs:
        assert isinstance(run, Captured), "every stage is captured"
        run._replay = poison_after(run, [other for other in runs if other is not run])
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


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_lone_picture_is_one_replay(engine, plain: Engine, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its whole plan; in a batch it goes step by step, to the same picture."""
    request, replays = GenerateRequest(prompt="a cat on pink", seed=5, steps=steps), list[str]()
    for (name, _), run in engine.backend._graphs.items():
        replay = run._replay
        monkeypatch.setattr(run, "_replay", lambda name=name, replay=replay: (replays.append(name), replay()))
    engine.generate(request)  # the prompt is known from now on
    replays.clear()
    alone = engine.generate(request)
    assert replays == [f"sampler_{steps}_from_embeddings"] and set(alone.timings.stages()) & {"sampler", "denoise"} == {
        "sampler"
    }
    replays.clear()
    two = [engine.submit(one) for one in (request, request.model_copy(update={"count": 2}))]
    together, _ = (drawing.result(60) for drawing in two)
    assert "denoiser" in replays
    for found in (alone, together):
        assert np.abs(found.images.astype(int) - plain.generate(request).images).max() <= 1


def test_a_plan_that_takes_fresh_noise_is_one_replay_too(tiny_student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_student, tmp_path / "renoise")
    describe(folder, sampler=Sampler(kind="renoise", start="sigma"), noise_correction=False)
    request = GenerateRequest(prompt="a cat on pink", seed=5, steps=3)
    with (
        Engine.load(folder, backend="torch", device="cpu", precision="fp32") as plain,
        captured_engine(folder) as engine,
    ):
        found = engine.generate(request)
        assert "sampler" in found.timings.stages()
        assert np.abs(found.images.astype(int) - plain.generate(request).images).max() <= 1


def test_a_student_whose_every_plan_takes_fresh_noise_loads(tiny_student: Path, tmp_path: Path) -> None:
    """The kernel was tried out with the first step's numbers and no noise, a row that such a plan does not have."""
    folder = shutil.copytree(tiny_student, tmp_path / "renoise")
    describe(folder, plans={3: [999, 666, 333]}, sampler=Sampler(kind="renoise"), noise_correction=False)
    with captured_engine(folder) as engine:
        assert engine.generate(GenerateRequest(prompt="a cat on pink", seed=5, steps=3)).images.std() > 0


def test_what_one_call_cannot_draw_goes_step_by_step(engine, plain: Engine) -> None:
    """A negative prompt, and several pictures."""
    for changes in ({"negative_prompt": "a dog", "guidance": 2.0}, {"count": 3}):
        request = GenerateRequest(prompt="a cat on pink", seed=5, steps=2, **changes)
        found = engine.generate(request)
        assert "sampler" not in found.timings.stages() and found.timings.denoise
        assert np.abs(found.images.astype(int) - plain.generate(request).images).max() <= 1


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


def test_making_ready_beside_drawing_writes_nothing_that_is_drawn_with(engine) -> None:
    """It wrote zeros into the input of the next call, and pictures that were being drawn came out wrong."""
    backend, run = engine.backend, engine.backend._graphs["denoiser", 1]
    with torch.inference_mode():
        run.ready, before = "the next", run.inputs[0].fill_(0.5).clone()
    backend.prepare(("text_encoder", "denoiser", "decoder"), (1, 2, 4))
    assert run.ready == "the next" and torch.equal(run.inputs[0], before)
    run.ready = None


VIEWS = "view|slice|select|as_strided|detach|alias|expand|unsqueeze|empty|lift_fresh|aten.to.|resolve"


def launches(counted: Recorder) -> list[str]:
    return [str(func) for func, *_ in counted.calls if not re.search(VIEWS, str(func))]


def test_a_lone_picture_of_a_cached_prompt_is_launched_with_few_calls(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise goes up and into its place, the prompt's embeddings into theirs; then one replay, and two copies to the host."""
    backend, model = engine.backend, engine.manifest
    conditions = backend.encode(engine.tokenizer.encode("a cat"))
    for run in backend._graphs.values():
        monkeypatch.setattr(run, "_replay", lambda: None)
    for steps in (1, 3):
        counted = Recorder()
        with counted:
            noise = backend.upload(np.zeros((1, *model.latent_shape), np.float32))
            backend.sample(f"sampler_{steps}_from_embeddings", conditions, noise)
        assert len(launches(counted)) <= 2 + len(conditions), launches(counted)


def test_a_cached_prompt_at_one_step_takes_few_operations(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host launches beside the replays, of a picture in a batch: at most 12, of which each is a copy or the update."""
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
    assert len(launches(counted)) + 3 + 2 <= 12, launches(counted)  # two copies to the host


@pytest.mark.parametrize(("dtype", "rounded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_float32_is_not_rounded_to_tf32_on_a_gpu(
    dtype: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is a setting of the whole process, and as before afterwards."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(ValueError), current(torch.device("cuda", 0), dtype):
        assert torch.backends.cudnn.allow_tf32 is rounded
        raise ValueError
    assert torch.backends.cudnn.allow_tf32
    first, second = ExitStack(), ExitStack()  # of two engines, which compute at once
    for each in (first, second):
        each.enter_context(current(torch.device("cuda", 0), dtype))
    first.close()
    assert torch.backends.cudnn.allow_tf32 is rounded
    second.close()
    assert torch.backends.cudnn.allow_tf32
