"""LoRAs by request: the pictures of diffusers' own pipeline with them, on every backend; and no trace of them in any other."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError
from imagine_flash.core.images import psnr
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine
from imagine_flash.engine.backends.openvino import processor_with_bf16
from imagine_flash.engine.fairness import FairShare
from imagine_flash.engine.work import Client
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.folders.files import NETWORKS_FILE
from imagine_flash.tests.engine.conftest import PROMPT, SETS, STEPS, TARGETS, Model, ask, levels, picture
from imagine_flash.tests.engine.gate import Gate
from imagine_flash.tests.engine.test_fairness import work
from imagine_flash.tests.loras import write_lora
from imagine_flash.tests.onnxruntime_device import load

OPENVINO = find_spec("openvino") is not None


def diffusers_pictures(model: Model) -> list[np.ndarray]:
    """Of its own pipeline without, then with each of the sets, from our noise."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(model.folder)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"latents": torch.from_numpy(step_noise(7, 1, (4, 8, 8), 0)), "output_type": "np"}
    if model.kind == "pixart":
        given |= {"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}

    def draw() -> np.ndarray:
        drawn = pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, **given)
        return (drawn.images[0] * 255).round().astype(np.uint8)

    pictures = [draw()]
    _load_in_diffusers(pipeline, model)
    for chosen in SETS:
        weights = [chosen.get(name, 0.0) for name in model.loras]
        for part in [pipeline] if model.kind != "pixart" else [pipeline.transformer, pipeline.text_encoder]:
            if model.kind == "pixart":  # peft's own way, since diffusers has none for this class
                _weigh(part, dict(zip(model.loras, weights, strict=True)))
            else:
                part.set_adapters(list(model.loras), weights)
        pictures.append(draw())
    return pictures


def _load_in_diffusers(pipeline: Any, model: Model) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    for name, folder in model.loras.items():
        if model.kind != "pixart":
            pipeline.load_lora_weights(folder, adapter_name=name)
            continue
        for part in sorted(Path(folder).iterdir()):
            module, config = getattr(pipeline, part.name), LoraConfig.from_pretrained(str(part))
            inject_adapter_in_model(config, module, adapter_name=name)
            tensors = load_file(part / "adapter_model.safetensors")
            named = {key.removeprefix("base_model.model."): values for key, values in tensors.items()}
            set_peft_model_state_dict(module, named, adapter_name=name)


def _weigh(module: torch.nn.Module, weights: dict[str, float]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            there: Any = layer
            there.set_adapter(list(there.lora_A))
            for name in there.lora_A:
                there.set_scale(name, weights[name])


@pytest.mark.parametrize("kind", TARGETS)
def test_they_draw_what_diffusers_draws(lora_model_of: Callable[[str], Model], kind: str) -> None:
    model = lora_model_of(kind)
    expected = diffusers_pictures(model)
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras) as engine:
        assert engine.loras == ["ink", "pixel"]
        before = picture(engine)
        assert psnr(before, expected[0]) >= 45
        for chosen, other in zip(SETS, expected[1:], strict=True):
            drawn = picture(engine, chosen)
            assert psnr(drawn, other) >= 45 and levels(drawn, before) > 5
        backwards = dict(reversed(SETS[0].items()))
        assert np.array_equal(picture(engine, backwards), picture(engine, SETS[0]))
        for none in (None, {}, {"pixel": 0.0}):
            assert np.array_equal(picture(engine, none), before), "not a bit of them is left"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.weekly] * (k != "sd15")) for k in TARGETS])
def test_an_artifact_draws_with_them_what_torch_does(
    lora_model_of: Callable[[str], Model], kind: str, tmp_path: Path
) -> None:
    """Two sizes, whose graphs share what is fed to them."""
    model, sizes = lora_model_of(kind), ((64, 64), (64, 96))
    options = ExportOptions(batch=(1, 2), forms="stages", image_encoder=False, sizes=sizes)
    export_student(model.student, tmp_path / kind, options=options)
    wide = {"height": 64, "width": 96}
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras, sizes=sizes) as engine:
        expected = [picture(engine, chosen, **size) for chosen in SETS for size in ({}, wide)]
    for backend in ("onnxruntime", "on device", *["openvino"] * OPENVINO):
        with load(tmp_path / kind, backend, loras=model.loras) as engine:
            before = picture(engine)
            drawn = [picture(engine, chosen, **size) for chosen in SETS for size in ({}, wide)]
            assert max(map(levels, drawn, expected)) <= 1
            assert np.array_equal(picture(engine), before)
        assert not engine.loras, "what they take is free"
    if OPENVINO and processor_with_bf16():
        with Engine.load(tmp_path / kind, backend="openvino", precision="bf16", loras=model.loras) as engine:
            was = picture(engine)
            drawn = [picture(engine, chosen, **size) for chosen in SETS for size in ({}, wide)]
            assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(drawn, expected, strict=True)) < 4
            assert np.array_equal(picture(engine), was)
    with Engine.load(tmp_path / kind, backend="onnxruntime") as engine:
        assert levels(picture(engine), before) <= 1
    (tmp_path / kind / NETWORKS_FILE).unlink()
    manifest = (tmp_path / kind / "manifest.json").read_text()
    assert NETWORKS_FILE in manifest and str(tmp_path) not in manifest


@pytest.mark.slow
@pytest.mark.weekly
def test_a_weight_that_equals_anothers_is_not_fed(tmp_path: Path) -> None:
    """An export stores equal weights as one, here zeros: a LoRA of one layer would have changed the other too."""
    from imagine_flash.tests import pipelines

    pipeline = pipelines.build_pipeline()
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn1.to_k", "attn1.to_v")):
            torch.nn.init.zeros_(module.weight)
    pipeline.save_pretrained(tmp_path / "student")
    lora = write_lora(tmp_path / "lora", pipelines.build_pipeline(), {"unet": ("to_k",)})
    options = ExportOptions(batch=(1, 2), forms="stages", image_encoder=False)
    export_student(pipelines.describe(tmp_path / "student"), tmp_path / "artifact", options=options)
    with pytest.raises(
        ArtifactError, match=r"does not hold the weight of unet\..*attn1\.to_k.*as one that can be replaced"
    ):
        Engine.load(tmp_path / "artifact", backend="onnxruntime", loras={"a": lora})


def test_sets_never_share_a_call_and_equals_do(lora_engine: Engine) -> None:
    chosen = [None, SETS[0], SETS[1], SETS[0], None]
    alone = [picture(lora_engine, one, seed=i) for i, one in enumerate(chosen)]
    gate = Gate(lora_engine)
    first = lora_engine.submit(ask(None, seed=0))
    assert gate.entered.wait(20)
    others = [lora_engine.submit(ask(one, seed=i)) for i, one in enumerate(chosen) if i]
    gate.open.set()
    together = [drawing.result(20).images[0] for drawing in (first, *others)]
    assert max(map(levels, alone, together)) <= 1
    assert sorted(gate.calls) == [1, 1, 1, 1, 2, 2, 2], "each with its like alone, ten rows in all"


def test_the_prompt_cache_knows_the_text_encoders_loras_apart(lora_model: Model) -> None:
    """Embeddings of the wrong set would be drawn with; those of a LoRA of the denoiser alone are the prompt's own."""
    with Engine.load(lora_model.student, backend="torch", device="cpu", loras=lora_model.loras) as engine:
        cached = [
            engine.generate(ask(one)).cached for one in (None, {"ink": 1.0}, {"pixel": 1.0}, {"pixel": 0.5}, None)
        ]
        assert cached == [False, True, False, False, True]
        assert engine.generate(ask({"ink": 0.2, "pixel": 0.5})).cached
        guided = ask({"pixel": 1.0}, guidance=3.0, negative_prompt="a dog")
        drawn, plain = engine.generate(guided).images, engine.generate(guided.model_copy(update={"lora": None})).images
    with Engine.load(
        lora_model.student, backend="torch", device="cpu", loras=lora_model.loras, prompt_cache_bytes=0
    ) as fresh:
        assert np.array_equal(fresh.generate(guided).images, drawn) and levels(drawn, plain) > 1


def test_what_is_written_is_timed_and_told(lora_engine: Engine) -> None:
    lora_engine.generate(ask())
    changed, again = (lora_engine.generate(ask({"pixel": 0.5, "ink": 0.0})) for _ in range(2))
    assert changed.timings.adapt > 0 == again.timings.adapt and "adapt" in changed.timings.stages()
    assert changed.loras == (("pixel", 0.5),) and changed.caption().startswith(f"{PROMPT} <lora:pixel:0.5>\n")


def test_no_set_starves() -> None:
    """In closed form: while one client asks for one set again and again, another's request has its turn at once."""
    share = FairShare()
    many = [work(Client("alice"), 1, lora={"pixel": 1.0})[0] for _ in range(20)]
    share.arrive("alice", is_waiting=False)
    share.begin(many[:4])
    share.arrive("bob", is_waiting=False)
    (other,) = work(Client("bob"), 1, lora={"ink": 1.0})
    group = share.next_group([*many[4:], other], 4, same_steps=False)
    assert group == [other]
    share.begin(group)
    group = share.next_group(many[4:], 4, same_steps=False)
    assert {chunk.job.loras for chunk in group} == {(("pixel", 1.0),)}
