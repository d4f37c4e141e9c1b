"""`export --any-size`: one set of graphs draws every size in its range as diffusers and torch draw it; others are refused."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from imagine_flash.core.errors import ArtifactError, RequestError
from imagine_flash.core.images import psnr
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.export import ExportOptions, export_student, tracing
from imagine_flash.export.options import parse_any_size
from imagine_flash.export.sides import FreeSides
from imagine_flash.export.weights import WeightStore
from imagine_flash.folders.manifests import ArtifactManifest, TensorSpec
from imagine_flash.folders.sizes import AnySize
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests import architectures, control
from imagine_flash.tests.loras import ATTENTION, write_lora
from imagine_flash.tests.onnxruntime_device import load

RANGE = AnySize(smallest=32, largest=96, multiple=16)
SIZES = ((64, 64), (32, 96), (80, 48), (96, 96))  # height, width
BACKENDS = ("onnxruntime", *(["openvino"] if find_spec("openvino") else []))
PROMPT = "a fox on a pink background"
CONTROLLED = (  # models that draw under a conditioning picture
    pytest.param("sd15", "controlnet"),
    pytest.param("sdxl", "adapter", marks=pytest.mark.weekly),
)


@dataclass(frozen=True)
class Model:
    """A student and its artifact of any size."""

    student: Path
    artifact: Path
    manifest: ArtifactManifest


def student_in(folder: Path, base: str, network: str) -> Path:
    """A plain pipeline's folder as a student with a ControlNet or T2I-adapter."""
    pipeline = architectures.DRAWN[base]()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    pipeline.save_pretrained(folder / "base")
    saved = control.saved(control.BUILDERS[network](pipeline.unet), folder / "network")
    return student_of(folder / "base", ModelOptions(steps=(1, 2), controlnet=str(saved)))


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Model]]:
    root, made = tmp_path_factory.mktemp("any-size"), dict[str, Model]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGINE_FLASH_CACHE", str(root / "cache"))

        def make(base: str, network: str) -> Model:
            name = f"{base}-{network}"
            if name not in made:
                student, told = student_in(root / name, base, network), list[int]()
                formats: Any = ("onnx", *BACKENDS[1:])
                options = ExportOptions(any_size=(32, 96), sizes=SIZES[:1], batch=(1, 2), formats=formats)
                manifest = export_student(
                    student, root / name / "out", options=options, progress=lambda what, total: told.append(total)
                )
                assert len(told) == told[0], "as many things were told as were announced"
                made[name] = Model(student, root / name / "out", manifest)
            return made[name]

        yield make


def diffusers_picture(student: Path, size: tuple[int, int], steps: int, **more: Any) -> np.ndarray:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(student, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(step_noise(7, 1, (4, size[0] // 8, size[1] // 8), 0))
    how = {"num_inference_steps": steps, "guidance_scale": 1.0, "latents": noise, "output_type": "np"}
    drawn = pipeline(PROMPT, height=size[0], width=size[1], **how, **more)
    return (drawn.images[0] * 255).round().astype(np.uint8)


def ask(size: tuple[int, int], **values: Any) -> GenerateRequest:
    return GenerateRequest(
        **{"prompt": PROMPT, "seed": 7, "guidance": 1.0, "height": size[0], "width": size[1], **values}
    )


def levels(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.slow
@pytest.mark.parametrize(("base", "network"), CONTROLLED)
def test_it_is_one_set_of_graphs_that_was_checked_at_three_sizes(model_of: Any, base: str, network: str) -> None:
    manifest = model_of(base, network).manifest
    assert set(manifest.graphs) == {"text_encoder", "denoiser", "decoder", "image_encoder", "condition_encoder"}
    assert manifest.any_size == RANGE and manifest.sizes == [(64, 64)]
    denoiser, decoder = manifest.graphs["denoiser"], manifest.graphs["decoder"]
    assert denoiser.inputs[0].shape == denoiser.outputs[0].shape == ["batch", 4, "height/8", "width/8"]
    assert decoder.outputs[0].shape == ["batch", "height", "width", 3]
    assert {picture.size for picture in manifest.references} == {(64, 64), (32, 96), (32, 32)}
    assert max(manifest.parity["denoiser"]["m"], manifest.parity["stages_2"]["latents"]) <= 1e-3
    assert manifest.parity["stages_2"]["images"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("base", "network"), CONTROLLED)
def test_every_size_is_drawn_as_diffusers_and_torch_draw_it(
    model_of: Any, base: str, network: str, backend: str
) -> None:
    """One engine, the sizes in turn and together; under a conditioning picture and without one; and from a picture."""
    model = model_of(base, network)
    scale = {"controlnet": "controlnet_conditioning_scale", "adapter": "adapter_conditioning_scale"}[network]
    with (
        Engine.load(model.artifact, backend=backend, precision="fp32") as engine,
        Engine.load(model.student, backend="torch", device="cpu", sizes=SIZES) as oracle,
    ):
        assert all(found.passed for found in engine.verify())
        together = [engine.submit(ask(size, steps=2, count=2)) for size in SIZES for _ in range(2)]
        for size, drawn in zip([size for size in SIZES for _ in range(2)], together, strict=True):
            got = drawn.result(120).images
            assert got.shape == (2, *size, 3)
            assert levels(got, oracle.generate(ask(size, steps=2, count=2)).images) <= 1
            asked = ask(size, steps=2, image=got[1], strength=0.6)
            assert levels(engine.generate(asked).images, oracle.generate(asked).images) <= 1
        for size in SIZES:
            condition = control.picture(1, side=96)[: size[0], : size[1]]
            for held in (0.5, 0.0):
                got = engine.generate(ask(size, steps=2, condition=condition, condition_scale=held)).images[0]
                told = {"image": Image.fromarray(condition), scale: held}
                assert psnr(got, diffusers_picture(model.student, size, 2, **told)) >= 45


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_sizes_are_refused_in_one_line(model_of: Any, backend: str) -> None:
    artifact = model_of("sd15", "controlnet").artifact
    with Engine.load(artifact, backend=backend) as engine:
        for size, near in (((72, 64), "64x64"), ((16, 64), "96x32"), ((128, 64), "48x96"), ((8, 8), "32x32")):
            message = f"this engine draws sides of 32 to 96 in multiples of 16, got {size[1]}x{size[0]}; try {near}"
            with pytest.raises(RequestError, match=f"^{message}$"):
                engine.generate(ask(size))
    with Engine.load(artifact, backend=backend, sizes=[(48, 80)]) as bound:
        assert bound.sizes == [(48, 80)] and bound.any_size is None
        assert bound.generate(GenerateRequest(prompt=PROMPT)).images.shape == (1, 48, 80, 3)
        with pytest.raises(RequestError, match=r"draws 80x48 \(width x height\), got 64x64$"):
            bound.generate(ask((64, 64)))
    with pytest.raises(RequestError, match="has the sizes sides of 32 to 96 in multiples of 16, got 64x72"):
        Engine.load(artifact, backend=backend, sizes=[(72, 64)])


@pytest.mark.slow
@pytest.mark.parametrize("backend", (*BACKENDS, "on device"))
def test_loras_are_swapped_at_any_size(model_of: Any, backend: str, tmp_path: Path) -> None:
    model = model_of("sd15", "controlnet")
    lora = {"pixel": str(write_lora(tmp_path / "lora", architectures.DRAWN["sd15"](), {"unet": ATTENTION}, seed=1))}
    with (
        load(model.artifact, backend, loras=lora) as engine,
        Engine.load(model.student, backend="torch", device="cpu", sizes=SIZES, loras=lora) as oracle,
    ):
        for size in SIZES[:3]:
            with_it, without = ask(size, lora={"pixel": 0.8}), ask(size)
            got = engine.generate(with_it).images
            assert levels(got, oracle.generate(with_it).images) <= 1 < levels(got, engine.generate(without).images)
            assert levels(engine.generate(without).images, oracle.generate(without).images) <= 1


@pytest.mark.slow
@pytest.mark.weekly
def test_eight_bits_of_any_size(tiny_student: Path, tmp_path: Path) -> None:
    """Calibrated at one size, judged at three, and drawn at others."""
    pytest.importorskip("openvino", reason="reads the graphs that are quantised")
    pytest.importorskip("nncf", reason="quantises the networks")
    short: Any = {"batch": (1, 1), "steps": (2,), "image_encoder": False, "formats": ("onnx", "openvino")}
    options = ExportOptions(any_size=(32, 96), int8="full", **short)
    manifest = export_student(tiny_student, tmp_path / "out", options=options)
    assert manifest.holds_int8
    with (
        Engine.load(tmp_path / "out", backend="openvino", precision="int8") as engine,
        Engine.load(tmp_path / "out", backend="onnxruntime") as exact,
    ):
        for size in SIZES:
            assert psnr(*(each.generate(ask(size, steps=2)).images for each in (engine, exact))) >= 20


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_a_unet_is_told_the_size_of_its_latents(kind: str) -> None:
    stages = stages_of(architectures.DRAWN[kind]())
    with torch.inference_mode():
        conditions = stages.text_encoder(*stages.encode_prompts([PROMPT]).values())
        x, t = torch.randn(1, 4, 4, 12), torch.tensor([999.0])
        given = (x, t, *conditions)
        assert torch.equal(stages.denoiser(None)(*given), stages.denoiser((32, 96))(*given))
    assert stages.any_size((32, 96)) == RANGE


@pytest.mark.parametrize("kind", ["sd3", "pixart", "flux", "sana"])
def test_other_networks_have_their_size_built_in(kind: str) -> None:
    stages = stages_of(architectures.DRAWN[kind]())
    message = f"the network of a {stages.pipeline} has its size built in, .*; name the sizes: --sizes 512x512,768x512"
    with pytest.raises(ArtifactError, match=message):
        stages.any_size((32, 96))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"any_size": (40, 96)}, "any_size must run upwards in multiples of 16 for this student, got 40-96; try 32-96"),
        ({"any_size": (64, 90)}, "got 64-90; try 64-96"),
        ({"any_size": (96, 32)}, "got 96-32; try 96-112"),
        (
            {"any_size": (80, 96)},
            "the size 64x64 is not among sides of 80 to 96 in multiples of 16; name others: --sizes",
        ),
        ({"any_size": (32, 96), "sizes": ((64, 72),)}, "the size 72x64 is not among sides of 32 to 96"),
    ],
)
def test_a_range_that_the_network_cannot_draw(values: Any, message: str, tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message) as raised:
        export_student(tiny_student, tmp_path / "out", options=ExportOptions(**values))
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"formats": ("tensorrt",)}, "any_size goes with the formats onnx and openvino; leave it out for tensorrt"),
        ({"formats": ("onnx", "triton-repository")}, "leave it out for triton-repository, and name sizes"),
        ({"forms": "whole-sampler"}, "graphs of the whole sampler are of one size each; leave out any_size"),
    ],
)
def test_what_has_fixed_sizes(values: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        ExportOptions(any_size=(256, 1024), **values)


@pytest.mark.slow
@pytest.mark.weekly
def test_sides_of_one_multiple_are_drawn_too(tiny_student: Path, tmp_path: Path) -> None:
    """It happened that torch.export refused them with an error of its own. The gate draws the sizes of every graph."""
    options = ExportOptions(
        any_size=(16, 64), sizes=((16, 16),), batch=(1, 1), steps=(1,), forms="stages", image_encoder=False
    )
    manifest = export_student(tiny_student, tmp_path / "out", options=options)
    assert set(manifest.graphs) == {"text_encoder", "denoiser", "decoder"} and manifest.sizes == [(16, 16)]
    assert {picture.size for picture in manifest.references} == {(16, 16), (16, 64), (64, 16)}


def test_a_graph_is_never_traced_with_sides_of_one_multiple(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.export takes an axis of 1 for a fixed one: so began the error of a range whose first size is its smallest."""
    stages, any_size = load_stages(tiny_student), AnySize(smallest=16, largest=64, multiple=16)
    assert FreeSides.around((64, 48), any_size).traced == (64, 48)
    assert FreeSides.around((16, 64), any_size).traced == (32, 64)
    monkeypatch.setattr(tracing, "export_text_encoder", lambda *_, **__: None)
    for kind in ("denoiser", "decoder", "image_encoder"):
        monkeypatch.setattr(tracing, f"export_{kind}", lambda stages, store, size, sides, **_: (size, sides.traced))
    store, told = WeightStore(tmp_path / "weights.bin"), list[str]()
    graphs = tracing._stage_graphs(stages, store, ((16, 16),), any_size, ExportOptions(), told.append)
    assert graphs.pop("text_encoder") is None
    assert graphs == dict.fromkeys(("denoiser", "decoder", "image_encoder"), ((32, 32), (32, 32)))


def test_what_is_read() -> None:
    assert parse_any_size("256-1024") == (256, 1024) and parse_any_size(None) is None
    for text in ("256", "all", "256x1024", "-1-4"):
        with pytest.raises(ArtifactError, match=f"any size is a range of sides such as 256-1024, got {text!r}"):
            parse_any_size(text)


def test_the_sizes_of_a_range() -> None:
    free = AnySize(smallest=256, largest=1024, multiple=64)
    assert free.holds((256, 1024)) and free.holds((512, 768))
    assert not any(map(free.holds, ((512, 500), (192, 512), (512, 1088), (0, 0))))
    nearest = {
        (1000, 1000): (1024, 1024),
        (1024, 1792): (576, 1024),
        (100, 200): (256, 512),
        (500, 4000): (256, 1024),
        (256, 512): (256, 512),
    }
    assert {size: free.nearest(size) for size in nearest} == nearest
    assert all(map(free.holds, (*nearest.values(), *free.corners)))
    for low, high in ((1024, 256), (250, 1024), (256, 1000), (256, 256)):
        with pytest.raises(ValidationError, match=f"must run upwards in multiples of 64, got {low}-{high}"):
            AnySize(smallest=low, largest=high, multiple=64)


def test_the_shape_of_a_tensor_at_a_size() -> None:
    spec = TensorSpec(name="latents", dtype="float32", shape=["batch", 4, "height/8", "width/8"])
    assert spec.at(2, (512, 768)) == (2, 4, 64, 96)
    assert TensorSpec(name="images", dtype="uint8", shape=["batch", "height", "width", 3]).at(1, (64, 32)) == (
        1,
        64,
        32,
        3,
    )
