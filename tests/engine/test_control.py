"""Pictures under a conditioning picture: diffusers' own pipelines are the oracle; each is the same alone and in a batch."""

import re
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imagine_flash.core.errors import RequestError
from imagine_flash.core.images import psnr
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends.base import stopwatch
from imagine_flash.engine.conditioning import Conditioning
from imagine_flash.engine.prompt_cache import DEFAULT_BYTES, PromptCache
from imagine_flash.engine.reference import reference_generate
from imagine_flash.engine.work import Chunk
from imagine_flash.folders.manifests import Guidance
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.tests import architectures, control, pipelines

TRAILING: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}
STEPS = (1, 2, 4)
SCALE_OF = {"controlnet": "controlnet_conditioning_scale", "adapter": "adapter_conditioning_scale"}
BASES = {**architectures.BUILDERS, "lcm": architectures.build_lcm}
MADE = {  # base, network, its config
    "sd15 controlnet": ("sd15", "controlnet", {}),
    "sd21 controlnet bgr": ("sd21", "controlnet", {"controlnet_conditioning_channel_order": "bgr"}),
    "sdxl controlnet": ("sdxl", "controlnet", {}),
    "lcm controlnet": ("lcm", "controlnet", {}),
    "sd15 adapter": ("sd15", "adapter", {}),
    "sd21 adapter": ("sd21", "adapter", {}),
    "sd21 grey adapter": ("sd21", "adapter", {"in_channels": 1}),
    "sdxl adapter": ("sdxl", "adapter", {}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """made(name): the student without and with its network, once."""
    root, known = tmp_path_factory.mktemp("control"), dict[str, tuple[Path, Path]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGINE_FLASH_CACHE", str(root / "cache"))

        def make(name: str) -> tuple[Path, Path]:
            if name not in known:
                base, kind, config = MADE[name]
                pipeline, folder = BASES[base](), root / name.replace(" ", "-")
                if base != "lcm":
                    pipeline.scheduler = diffusers.EulerDiscreteScheduler(**TRAILING)
                pipeline.save_pretrained(folder / "base")
                network = control.saved(control.BUILDERS[kind](pipeline.unet, **config), folder / "network")
                options = ModelOptions(steps=STEPS)
                controlled = options.model_copy(update={"controlnet": str(network)})
                known[name] = (student_of(folder / "base", options), student_of(folder / "base", controlled))
            return known[name]

        yield make


class Networks:
    """Of a conditioning picture it makes 8 bytes a pixel."""

    read = 0

    def encode_condition(self, pictures: np.ndarray) -> tuple[np.ndarray, ...]:
        self.read += 1
        return (np.zeros(pictures.shape[:3], np.float64),)


def test_black_pictures_of_many_sizes_take_no_more_than_a_prompt_cache() -> None:
    """One was kept of each size that was drawn without a condition, 3 GiB after 388 of them."""
    networks: Any = Networks()
    conditioning = Conditioning(networks, PromptCache(), Guidance(), is_controlled=True)

    def control_of(size: tuple[int, int]) -> tuple[np.ndarray, ...]:
        request = types.SimpleNamespace(condition=None)
        job: Any = types.SimpleNamespace(
            request=request, size=size, control=(), stopwatch=stopwatch, spent=lambda *_: None
        )
        conditioning.read_picture([Chunk(job, 0, np.zeros((1, 1, 4, 8, 8), np.float32))])
        return job.control

    sizes = [(height, 1024) for height in range(512, 1024, 8)]  # 4 to 8 MiB each
    kept = [weakref.ref(control_of(size)[0]) for size in sizes]
    assert 0 < sum(one.nbytes for known in kept if (one := known()) is not None) <= DEFAULT_BYTES
    assert networks.read == len(sizes) and control_of(sizes[-1])[0] is kept[-1]() and networks.read == len(sizes)
    assert [control_of((4096, 4096))[0].shape for _ in range(2)] == [(1, 4096, 4096)] * 2, "too large to be kept"


def ask(**values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "seed": 7, "guidance": 1.0, **values})


def diffusers_picture(student: Path, pictured: np.ndarray, steps: int, guidance: float, **scale: float) -> np.ndarray:
    """Of its own pipeline with its own scheduler, from our noise."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(pictured)
    reads_grey = "adapter" in pipeline.components and pipeline.adapter.config.in_channels == 1
    drawn: Any = pipeline(
        "a cat",
        image=image.convert("L") if reads_grey else image,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(step_noise(7, 1, (4, 8, 8), 0)),
        output_type="np",
        **scale,
    )
    return (drawn.images[0] * 255).round().astype(np.uint8)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", [name for name in MADE if "lcm" not in name])
def test_it_is_drawn_as_diffusers_draws_it(made: Any, name: str, steps: int) -> None:
    """At scales 0, 0.5 and 1, without guidance and with it, where both rows of a picture read the condition."""
    plain, student = made(name)
    condition, scale_of = control.picture(1), SCALE_OF[MADE[name][1]]
    if "grey" in name:
        condition = condition[..., :1].repeat(3, 2)
    with Engine.load(student, backend="torch") as engine, Engine.load(plain, backend="torch") as base:
        for guidance, scales in ((1.0, (0.0, 1.0)), (3.0, (0.5,))) if steps > 1 else ((1.0, (0.5,)),):
            without = base.generate(ask(steps=steps, guidance=guidance)).images[0]
            for scale in scales:
                asked = ask(steps=steps, guidance=guidance, condition=condition, condition_scale=scale)
                got = engine.generate(asked).images[0]
                expected = diffusers_picture(student, condition, steps, guidance, **{scale_of: scale})
                assert psnr(got, expected) >= 45
                assert np.array_equal(got, without) == (scale == 0.0), "it changes the picture"
            assert np.array_equal(engine.generate(ask(steps=steps, guidance=guidance)).images[0], without)


def test_a_network_that_is_told_its_guidance_has_one_too(made: Any) -> None:
    """The ControlNet is not told the scale, as in diffusers; one step, so that no noise is drawn."""
    _, student = made("lcm controlnet")
    with Engine.load(student, backend="torch") as engine:
        got = engine.generate(ask(steps=1, guidance=4.0, condition=control.picture(1))).images[0]
    assert psnr(got, diffusers_picture(student, control.picture(1), 1, 4.0)) >= 45


@pytest.fixture(scope="module", params=["sd15 controlnet", "sdxl adapter"])
def engine(made: Any, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(made(request.param)[1], backend="torch", max_batch=4) as loaded:
        yield loaded


def likeness(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_each_picture_is_the_same_in_company(engine: Engine) -> None:
    """Other conditions, other scales, none, guidance and other steps share its calls."""
    asked = [
        ask(seed=1, steps=4, condition=control.picture(1)),
        ask(seed=2, steps=2, condition=control.picture(2), condition_scale=0.4, guidance=2.0),
        ask(seed=3, steps=4),
        ask(seed=4, steps=1, condition=control.picture(3), count=3),
    ]
    alone = [reference_generate(engine.backend, engine.tokenizer, engine.manifest, one) for one in asked]
    shared = engine.stats().batches.get(4, 0)
    together = [engine.submit(one) for one in asked]
    for drawing, images in zip(together, alone, strict=True):
        assert likeness(drawing.result(30).images, images) <= 1
    assert engine.stats().batches[4] > shared


def test_a_picture_to_start_from_goes_with_it(engine: Engine) -> None:
    start, mask = control.picture(5), np.zeros((64, 64), bool)
    mask[:, 32:] = True
    asked = {"steps": 4, "image": start, "mask": mask}
    got = engine.generate(ask(**asked, condition=control.picture(1))).images[0]
    assert np.array_equal(got[:, :32], start[:, :32])
    assert likeness(got, engine.generate(ask(**asked)).images[0]) > 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "size": (
        {"condition": control.picture(side=32)},
        "condition must have the request's size 64x64, got 32x32; resize it",
    ),
    "kind": ({"condition": np.zeros((64, 64, 3))}, "condition must be uint8 (H, W, 3), got float64 (64, 64, 3)"),
    "channels": ({"condition": np.zeros((64, 64), np.uint8)}, "condition must be uint8 (H, W, 3), got uint8 (64, 64)"),
    "negative": (
        {"condition_scale": -0.1},
        "condition_scale must be a number from 0 to 10; 1 is the network's own, got -0.1",
    ),
    "infinite": ({"condition_scale": float("inf")}, "condition_scale must be a number from 0 to 10"),
    "nan": ({"condition_scale": float("nan")}, "condition_scale must be a number from 0 to 10"),
    "text": ({"condition_scale": "much"}, "condition_scale must be a number from 0 to 10"),
    "alone": ({"condition": None, "condition_scale": 0.5}, "condition_scale needs a condition"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_condition(engine: Engine, name: str) -> None:
    values, says = BAD[name]
    with pytest.raises(RequestError, match=re.escape(says)) as caught:
        engine.generate(ask(steps=1, **({"condition": control.picture()} | values)))
    assert "\n" not in str(caught.value)


def test_a_model_without_reads_none(made: Any) -> None:
    with Engine.load(made("sd15 controlnet")[0]) as engine:
        with pytest.raises(RequestError, match=r"reads no conditioning picture: .* --controlnet") as caught:
            engine.generate(ask(steps=1, condition=control.picture()))
        assert caught.value.param == "condition"


def test_sizes_are_those_that_the_adapter_takes(made: Any) -> None:
    """It makes one place of 16 pixels."""
    with pytest.raises(Exception, match="a size must be a multiple of 16 for this student, got 72x64; try 64x64"):
        Engine.load(made("sdxl adapter")[1], sizes=[(64, 72)])


def test_a_lora_is_fused_into_a_model_with_an_adapter(made: Any, tmp_path: Path) -> None:
    """diffusers' pipeline of T2I-adapters for Stable Diffusion 1.x reads no LoRA itself."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from imagine_flash.pipelines.loading import load_student_pipeline
    from imagine_flash.pipelines.lora import Lora

    pipeline = pipelines.build_pipeline()
    torch.manual_seed(4)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    layers: Any = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    student = made("sd15 adapter")[1]
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    before = load_student_pipeline(student).unet.state_dict()[key]
    after = load_student_pipeline(student, loras=[Lora(str(tmp_path / "lora"))]).unet.state_dict()[key]
    assert not torch.equal(before, after)


def test_captured_graphs_read_it_as_an_input_too(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated without a GPU: what is not written before each replay is poisoned."""
    from imagine_flash.engine.backends.base import BackendOptions
    from imagine_flash.engine.backends.torch import TorchBackend, load_student
    from imagine_flash.engine.backends.torch_modes import Captured
    from imagine_flash.pipelines.loading import load_stages
    from imagine_flash.tests.engine.test_captured import emulate, make_recordable, poison_after

    student = made("sd15 controlnet")[1]
    _, tokenizer, model = load_student(student, "torch", BackendOptions(device="cpu", precision="fp32"), None)
    make_recordable(monkeypatch)
    stages = load_stages(student, dtype=torch.float32)
    how: dict[str, Any] = {"name": "torch-graph", "batches": (1, 2), "capture": emulate}
    backend = TorchBackend(student, model, stages, torch.device("cpu"), **how)
    backend.prepare(model.stages, (1, 2))
    runs = [run for run in backend._graphs.values() if isinstance(run, Captured)]
    for run in (backend._graphs["denoiser", 2], backend._graphs["sampler_2_from_embeddings", 1]):
        assert isinstance(run, Captured)
        others = [other for other in runs if other is not run]
        monkeypatch.setattr(run, "_replay", poison_after(run, others))
    with Engine(backend, tokenizer, model, max_batch=2) as engine, Engine.load(student, backend="torch") as plain:
        asked = [ask(steps=2, seed=1, condition=control.picture(1)), ask(steps=2, seed=2, guidance=2.0)]
        for drawing, one in zip([engine.submit(each) for each in asked], asked, strict=True):
            assert likeness(drawing.result(60).images, plain.generate(one).images) <= 1
