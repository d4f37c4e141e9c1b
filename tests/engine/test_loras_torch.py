"""LoRAs by request where torch draws: in half precision, captured, compiled, and where a write fails."""

import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from imagine_flash.core.errors import EngineError
from imagine_flash.engine import Engine
from imagine_flash.engine.backends.torch import TorchBackend
from imagine_flash.engine.backends.torch_modes import Captured
from imagine_flash.engine.backends.torch_tuning import compiled
from imagine_flash.pipelines.adapters import Adapter, Rewriter, read_adapters
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.tests.engine.conftest import SETS, Model, ask, levels, picture
from imagine_flash.tests.engine.test_captured import emulate, make_recordable


def test_a_half_network_is_as_it_was_afterwards(lora_model: Model) -> None:
    with Engine.load(
        lora_model.student, backend="torch", device="cpu", precision="bf16", loras=lora_model.loras
    ) as engine:
        before = picture(engine)
        assert levels(picture(engine, SETS[0]), before) > 5 and np.array_equal(picture(engine), before)


def test_closing_frees_what_loras_and_prompts_take(lora_model: Model) -> None:
    """The engine's object kept both."""
    engine = Engine.load(lora_model.student, backend="torch", device="cpu", loras=lora_model.loras)
    picture(engine, SETS[0])
    assert engine.loras and engine.prompt_cache.used_bytes
    engine.close()
    backend: Any = engine.backend
    assert not engine.loras and not engine.prompt_cache.used_bytes and not backend._rewriter.bytes


def test_captured_calls_draw_with_what_is_written(
    lora_model: Model, lora_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are captured before any LoRA is, and are not captured again."""
    make_recordable(monkeypatch)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(lora_model.folder)
    adapters = read_adapters(pipeline, "unet", lora_model.loras)
    backend = TorchBackend(
        lora_model.student,
        lora_engine.manifest,
        stages_of(pipeline),
        torch.device("cpu"),
        name="torch-graph",
        capture=emulate,
        adapters=adapters,
    )
    backend.prepare(("text_encoder", "denoiser", "decoder"))
    with Engine(backend, lora_engine.tokenizer, lora_engine.manifest, max_batch=1) as captured:
        graphs = dict(backend._graphs)
        assert all(isinstance(run, Captured) for run in graphs.values())
        for chosen in (None, SETS[0], SETS[1], None):
            assert levels(picture(captured, chosen), picture(lora_engine, chosen)) <= 1
        assert backend._graphs == graphs


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_with_what_is_written() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from imagine_flash.pipelines.lora import ADAPTER

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv1d(3, 3, 1)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), plain, adapter_name=ADAPTER)
    layer: Any = plain[0]
    plain[0] = layer.get_base_layer()
    rewriter = Rewriter({"a": Adapter({"0": layer}, frozenset({"denoiser"}))})
    with torch.inference_mode():
        x = torch.randn(2, 3, 8)
        fast, before, first = compiled(plain, [x]), plain(x), layer.get_base_layer()
        with torch.compiler.set_stance("fail_on_recompile"):
            for weight in (0.7, 0.0, -1.0):
                rewriter.write({"a": weight} if weight else {})
                expected = plain[1](x @ first.weight.T + first.bias)
                assert torch.allclose(fast(x), expected, atol=1e-6)
                assert torch.allclose(fast(x), before, atol=1e-6) == (weight == 0)


def test_a_write_that_fails_leaves_no_trace(lora_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the layers were written when memory ran out."""
    with Engine.load(lora_model.student, backend="torch", device="cpu", loras=lora_model.loras) as engine:
        before, calls, delta = picture(engine), [], Adapter.delta

        def fails(self: Adapter, path: str) -> torch.Tensor:
            calls.append(path)
            if len(calls) == 4:
                raise RuntimeError("out of memory")
            return delta(self, path)

        with monkeypatch.context() as patch:
            patch.setattr(Adapter, "delta", fails)
            with pytest.raises(EngineError, match="adapt: out of memory"):
                engine.generate(ask(SETS[0]))
        assert np.array_equal(picture(engine), before)
        assert levels(picture(engine, SETS[0]), before) > 5
