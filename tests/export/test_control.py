"""Exports with a ControlNet or T2I-adapter: one more stage, whose picture is an input of the denoiser, behind the same gate."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imagine_flash.core.errors import ArtifactError
from imagine_flash.core.images import psnr
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.tests import architectures, control
from imagine_flash.tests.onnxruntime_device import load

STEPS = (1, 2, 4)
SCALE_OF = {"controlnet": "controlnet_conditioning_scale", "adapter": "adapter_conditioning_scale"}


def build(base: str, kind: str, folder: Path) -> Path:
    """A student in half precision with its network, as most are stored."""
    pipeline = architectures.BUILDERS[base]()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    network = control.BUILDERS[kind](pipeline.unet).to(torch.float16)
    pipeline.to(torch.float16).save_pretrained(folder / "base")
    options = ModelOptions(steps=STEPS, controlnet=str(control.saved(network, folder / "network")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGINE_FLASH_CACHE", str(folder / "cache"))
        return student_of(folder / "base", options)


MODELS = [("sd15", "controlnet"), pytest.param(("sdxl", "adapter"), marks=pytest.mark.weekly)]


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def exported(request: pytest.FixtureRequest, once_a_run: Callable[..., Path]) -> Any:
    base, kind = request.param

    def make(folder: Path) -> None:
        student = Path(shutil.copytree(build(base, kind, folder / "made"), folder / "student"))
        told: list[int] = []
        options = ExportOptions(batch=(1, 2), formats=("onnx", "openvino", "triton-repository"))
        export_student(student, folder / "out", options=options, progress=lambda what, total: told.append(total))
        assert len(told) == told[0], "as many things were told as were announced"

    folder = once_a_run(f"{base}_{kind}", make)
    return kind, folder / "student", read_artifact_manifest(folder / "out"), folder / "out"


@pytest.mark.slow
def test_the_picture_is_a_stage_and_an_input_of_the_denoiser(exported: Any) -> None:
    kind, _, manifest, _ = exported
    encoder, denoiser = manifest.graphs["condition_encoder"], manifest.graphs["denoiser"]
    features = ["control"] if kind == "controlnet" else ["feature_0", "feature_1"]
    assert [(spec.name, spec.dtype, spec.shape) for spec in encoder.inputs] == [
        ("condition", "uint8", ["batch", 64, 64, 3])
    ]
    assert [spec.name for spec in encoder.outputs] == features
    assert [spec.name for spec in denoiser.inputs][-len(features) - 1 :] == [*features, "condition_scale"]
    assert not [name for name in manifest.graphs if name.startswith("sampler")]
    assert manifest.control == ("ControlNetModel" if kind == "controlnet" else "T2IAdapter")
    assert manifest.parity["condition_encoder"][features[0]] <= 1e-4
    assert all(reference.condition in manifest.files for reference in manifest.references)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "on device", "openvino"])
def test_the_runtime_draws_what_diffusers_and_torch_draw(exported: Any, backend: str) -> None:
    kind, student, _, artifact = exported
    condition = control.picture(1)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(student, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with load(artifact, backend) as engine, Engine.load(student) as oracle:
        assert all(one.passed for one in engine.verify())
        for steps in STEPS:
            for guidance, scale in ((1.0, 0.0), (1.0, 1.0), (3.0, 0.5)):
                asked = {"prompt": "a cat", "steps": steps, "guidance": guidance, "seed": 7}
                held = asked | {"condition": condition, "condition_scale": scale}
                got = engine.generate(GenerateRequest(**held, count=3)).images
                expected: Any = pipeline(
                    "a cat",
                    image=Image.fromarray(condition),
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    latents=torch.from_numpy(step_noise(7, 1, (4, 8, 8), 0)),
                    output_type="np",
                    **{SCALE_OF[kind]: scale},
                )
                assert psnr(got[0], (expected.images[0] * 255).round().astype(np.uint8)) >= 45
                assert np.abs(got.astype(int) - oracle.generate(GenerateRequest(**held, count=3)).images).max() <= 1
                plain = engine.generate(GenerateRequest(**asked, count=3)).images
                assert np.array_equal(plain, got) == (scale == 0.0)
        drawn = [
            engine.submit(GenerateRequest(prompt="a cat", seed=i, condition=control.picture(i) if i % 2 else None))
            for i in range(4)
        ]
        for i, one in enumerate(drawn):
            alone = oracle.generate(
                GenerateRequest(prompt="a cat", seed=i, condition=control.picture(i) if i % 2 else None)
            )
            assert np.abs(one.result(60).images.astype(int) - alone.images).max() <= 1


@pytest.mark.slow
@pytest.mark.weekly
def test_half_precision_passes_the_gate(tmp_path: Path) -> None:
    student = build("sd15", "controlnet", tmp_path)
    options = ExportOptions(precision="fp16", steps=(1,), batch=(1, 1), image_encoder=False)
    manifest = export_student(student, tmp_path / "out", options=options)
    assert manifest.parity["stages_1"]["psnr"] >= 35
    with Engine.load(tmp_path / "out", backend="onnxruntime") as engine, Engine.load(student) as oracle:
        asked = GenerateRequest(prompt="a cat", seed=7, steps=1, condition=control.picture(1))
        assert psnr(engine.generate(asked).images[0], oracle.generate(asked).images[0]) >= 35


def test_whole_sampler_graphs_are_refused(tmp_path: Path) -> None:
    student = build("sd15", "adapter", tmp_path)
    with pytest.raises(ArtifactError, match="a model with a T2I-adapter has no whole-sampler graphs"):
        export_student(student, tmp_path / "out", options=ExportOptions(forms="whole-sampler"))
    assert not (tmp_path / "out").exists()
