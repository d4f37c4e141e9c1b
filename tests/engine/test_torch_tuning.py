"""Kernels tried out at load: the same pictures, torch's own names of its settings, and a compiler's cache that is kept."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from imagine_flash.core.errors import RequestError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends import torch_tuning
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.torch import TorchBackend, load_student
from imagine_flash.engine.backends.torch_tuning import (
    OPTIONS,
    PLACE,
    AttentionCalls,
    Maker,
    fastest_attention,
    fuse_projections,
    keep_compiled,
)
from imagine_flash.folders.cache import cached
from imagine_flash.pipelines.adapters import Adapter
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests import architectures
from imagine_flash.tests.commands import fails, run
from imagine_flash.tests.engine.test_captured import emulate, make_recordable

KNOWN = "goes with the backend torch-compile or torch-graph"


def test_the_settings_are_torchs() -> None:
    """torch refuses names that it does not know; the mode that is published is among them."""
    torch.compile(torch.nn.Linear(2, 2), dynamic=False, options=OPTIONS)
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        torch.compile(torch.nn.Linear(2, 2), options={"conv_1x1_as_matmul": True})
    assert torch._inductor.list_mode_options("max-autotune-no-cudagraphs").items() <= OPTIONS.items()


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "sd3", "pixart", "flux"])
def test_fused_projections_compute_the_same(kind: str) -> None:
    pipeline = architectures.DRAWN[kind]()
    stages = stages_of(pipeline)
    network = stages.denoiser(stages.default_size).eval()
    called: list[str] = []
    for name, part in network.named_modules():
        if isinstance(part, torch.nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
            part.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.inference_mode():
        conditions = [*stages.text_encoder(*stages.example_tokens(2).values())]
        if stages.is_told_guidance:
            conditions.append(torch.ones(2))
        torch.manual_seed(0)
        x, t = torch.randn(2, *stages.latent_shape(stages.default_size)), torch.tensor([999.0, 500.0])
        before, plain = network(x, t, *conditions), len(called)
        called.clear()
        assert fuse_projections(network) == 1
        torch.testing.assert_close(network(x, t, *conditions), before, rtol=1e-4, atol=1e-5)
    assert len(called) < plain and not any(name.endswith("to_k") for name in called)
    assert not any(weight.requires_grad for weight in network.parameters())


class Attends(torch.nn.Module):
    """Three times over tokens like these, twice in the same way."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = scaled_dot_product_attention(x, x, x)
        x = scaled_dot_product_attention(x, x, x)
        return scaled_dot_product_attention(x, x, x, attn_mask=mask)


def again(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    return lambda: call(), call()


def test_attention_is_the_one_that_measured_fastest() -> None:
    x, mask = torch.randn(1, 2, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    with AttentionCalls() as calls:
        expected = Attends()(x, mask)
    assert sorted(count for _, count in calls.found.values()) == [1, 2]
    taken: Iterator[float] = iter([3.0, 2.0, 2.0, 2.0, 9.0] + [1.5] * 5 + [8.0] * 5)  # the best of five turns counts
    order = fastest_attention(Attends(), [x, mask], again, lambda: lambda: lambda: next(taken))
    assert order[0] is SDPBackend.CUDNN_ATTENTION and set(order) == set(torch_tuning.ATTENTION)
    made = Maker(False, True, again, lambda: lambda: lambda: 0.0)
    torch.testing.assert_close(made(Attends(), [x, mask])(x, mask), expected)
    assert made.how == ["tuned", "attention flash"] and not torch.backends.cudnn.benchmark


def test_attention_that_fails_is_left_out() -> None:
    x, mask = torch.randn(1, 2, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    captures = iter([RuntimeError("no plan"), None, None])

    def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if error := next(captures):
            raise error
        return again(call)

    order = fastest_attention(Attends(), [x, mask], capture, lambda: lambda: lambda: 1.0)
    assert order[0] is SDPBackend.CUDNN_ATTENTION
    assert fastest_attention(torch.nn.Linear(8, 8), [x], again, lambda: lambda: lambda: 1.0) == []


def test_captured_networks_that_are_tuned_draw_the_same(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recordable(monkeypatch)
    options = BackendOptions(device="cpu", precision="fp32")
    _, tokenizer, model = load_student(tiny_student, "torch", options, None)
    told = {"name": "torch-graph", "batches": (1, 2), "capture": emulate, "autotune": True}
    backend = TorchBackend(tiny_student, model, load_stages(tiny_student), torch.device("cpu"), **told)
    assert backend._networks["denoiser"].denoiser.unet.original_attn_processors  # type: ignore[attr-defined]
    with Engine(backend, tokenizer, model, max_batch=2) as tuned, Engine.load(tiny_student, device="cpu") as plain:
        for count, steps in ((1, 2), (2, 1)):
            request = GenerateRequest(prompt="a cat on pink", seed=5, steps=steps, count=count)
            found, expected = (engine.generate(request).images.astype(int) for engine in (tuned, plain))
            assert np.abs(found - expected).max() <= 1
        assert ", tuned, attention " in tuned.describe()


def test_projections_that_loras_are_written_into_stay_apart(tiny_student: Path) -> None:
    options = BackendOptions(device="cpu", precision="fp32")
    _, _, model = load_student(tiny_student, "torch", options, None)
    adapters = {"a LoRA without layers": Adapter({}, frozenset({"denoiser"}))}
    stages = load_stages(tiny_student)
    backend = TorchBackend(
        tiny_student, model, stages, torch.device("cpu"), name="torch-compile", adapters=adapters, autotune=True
    )
    assert not hasattr(backend._networks["denoiser"].denoiser.unet, "original_attn_processors")  # type: ignore[attr-defined]


def test_who_cannot_be_tuned_says_so(tiny_student: Path) -> None:
    for load in (
        partial(Engine.load, tiny_student, autotune=True),
        partial(Engine.load, tiny_student, backend="torch", autotune=True),
        partial(Engine.load, backend="openvino", autotune=True),
    ):
        with pytest.raises(RequestError, match=f"^autotune: {KNOWN}, got the backend"):
            load()
    assert f"--autotune: {KNOWN}, got the backend auto" in fails("serve", "--autotune", "--port", "0")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path))
    monkeypatch.setenv(PLACE, "")  # what the test sets is taken back
    monkeypatch.delenv(PLACE)
    return tmp_path


def test_what_is_compiled_is_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_compiled()
    assert os.environ[PLACE] == str(cache / "torch-compile")
    (cache / "torch-compile" / "fxgraph").mkdir()
    assert [one.name for one in cached()] == ["torch-compile"]
    assert "torch-compile" in run("cache", "remove", "torch-compile").stdout and not cached()
    monkeypatch.setenv(PLACE, "/elsewhere")
    keep_compiled()
    assert os.environ[PLACE] == "/elsewhere", "a place that was chosen stays"


def test_without_a_cache_torch_chooses(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", "")
    keep_compiled()
    assert PLACE not in os.environ and not list(cache.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
def test_a_second_process_finds_what_was_compiled(cache: Path) -> None:
    """The compiler forgets all that it holds in between; compiled with every setting, it draws what it draws without."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.SiLU(), torch.nn.Linear(8, 16))
    network.requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(1, 4, 8, 8)
        expected, hits = network(x), []
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            torch.testing.assert_close(Maker(True, True, None, lambda: lambda: lambda: 0.0)(network, [x])(x), expected)
            hits.append(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
    assert hits[0] == 0 < hits[1]
    assert [one.name for one in cached()] == ["torch-compile"]
