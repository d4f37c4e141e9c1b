"""Precisions and formats of a whole export, and what cannot be asked for."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.export.options import parse_batch, parse_sizes, parse_steps, read_prompts
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.tests import pipelines

ONE = {"steps": (2,), "batch": (1, 2)}


@pytest.fixture(scope="module", params=["fp16", pytest.param("bf16", marks=pytest.mark.weekly)])
def lowered(request, tiny_student, once_a_run):
    options = ExportOptions(precision=request.param, formats=("onnx", "tensorrt"), **ONE)
    folder = once_a_run(request.param, lambda out: export_student(tiny_student, out, options=options))
    return read_artifact_manifest(folder), folder


@pytest.mark.slow
def test_half_precision_keeps_the_angles_of_the_time_in_float32(lowered):
    manifest, _ = lowered
    assert manifest.graphs["denoiser"].islands == ["unet.time_proj"]
    assert manifest.graphs["denoiser"].nodes == {"Attention": 8, "GroupNormalization": 21, "LayerNormalization": 12}
    inputs = {spec.name: spec.dtype for spec in manifest.graphs["sampler_2"].inputs}
    assert (
        inputs == {"input_ids": "int64", "noise": "float32"} and manifest.graphs["decoder"].outputs[0].dtype == "uint8"
    )


@pytest.mark.slow
def test_half_precision_differs_and_passes_its_limits(lowered):
    manifest, _ = lowered
    sampler = manifest.parity["sampler_2"]
    assert sampler["psnr"] >= manifest.limits["psnr"] and 1e-5 < manifest.parity["denoiser"]["m_rms"] < 0.05


@pytest.mark.slow
def test_half_precision_is_stored_once_and_small(lowered, tiny_artifact):
    _, folder = lowered
    whole = (tiny_artifact / "weights.bin").stat().st_size
    assert (folder / "weights.bin").stat().st_size <= 1.1 * whole
    assert not list(folder.glob(".*")), "a probe or check graph was left behind"


@pytest.mark.slow
def test_fp16_runs_here_and_draws_the_reference_pictures(lowered):
    manifest, folder = lowered
    if manifest.precision != "fp16":
        with pytest.raises(ArtifactError, match="onnxruntime cannot run"):
            Engine.load(folder)
        return
    assert all(found.passed for found in Engine.load(folder).verify())


@pytest.mark.slow
def test_tensorrt_gets_a_recipe_for_every_graph(lowered):
    manifest, folder = lowered
    recipe = json.loads((folder / manifest.formats["tensorrt"]["recipe"]).read_text(encoding="utf-8"))
    assert set(recipe["graphs"]) == set(manifest.graphs) and "tensorrt/build.json" in manifest.files
    assert {graph["file"] for graph in recipe["graphs"].values()} == {
        f"tensorrt/{name}.onnx" for name in manifest.graphs
    }


@pytest.mark.slow
def test_an_overflow_is_found_and_cured(tmp_path):
    """A convolution scaled by 3e5 before a GroupNorm: the same function, but its values do not fit in fp16."""
    student = pipelines.build_student(tmp_path / "student", half=False)
    file = student / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    block = "mid_block.resnets.0"
    for name in ("conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias"):
        weights[f"{block}.{name}"] *= 3e5
    save_file(weights, file, metadata={"format": "pt"})
    manifest = export_student(student, tmp_path / "out", options=ExportOptions(precision="fp16", **ONE))
    islands = set(manifest.graphs["denoiser"].islands)
    assert {f"unet.{block}.conv1", f"unet.{block}.norm2"} <= islands and len(islands) < 10, islands
    assert manifest.parity["denoiser"]["m_rms"] < 0.01


@pytest.mark.slow
def test_other_formats_lie_in_the_same_artifact(two_sizes):
    pytest.importorskip("openvino")
    manifest = read_artifact_manifest(two_sizes)
    listed = {*manifest.files, "manifest.json"}
    assert listed == {path.relative_to(two_sizes).as_posix() for path in two_sizes.rglob("*") if path.is_file()}
    assert {"openvino/denoiser.xml", "triton_repository/sampler_1/config.pbtxt"} <= listed
    assert Engine.load(two_sizes).generate(GenerateRequest(prompt="a fox", seed=1)).images.std() > 5


@pytest.mark.slow
def test_two_sizes_share_their_weights(two_sizes, tiny_artifact):
    one = (tiny_artifact / "weights.bin").stat().st_size
    assert (two_sizes / "weights.bin").stat().st_size < 1.02 * one
    engine, usual = Engine.load(two_sizes), Engine.load(tiny_artifact)
    request = {"prompt": "a fox", "seed": 1, "steps": 1}
    assert engine.generate(GenerateRequest(**request, width=128)).images.shape == (1, 64, 128, 3)
    same = [e.generate(GenerateRequest(**request)).images.astype(int) for e in (engine, usual)]
    assert np.abs(same[0] - same[1]).max() <= 1
    assert [found.reference.size for found in engine.verify()] == [(64, 64), (64, 128)]


BAD = {
    "batch": ({"batch": (4, 1)}, r"batch must run upwards from 1 to at most 63, got 4-1; try 1-4"),
    "precision": ({"precision": "fp8"}, "precision: input should be 'fp32', 'fp16' or 'bf16', got 'fp8'"),
    "format": ({"formats": ("coreml",)}, "formats: input should be 'onnx', 'tensorrt', 'openvino' or .*, got 'coreml'"),
    "format's precision": (
        {"formats": ("triton-repository",), "precision": "bf16"},
        "the format triton-repository takes precision fp32 or fp16, got bf16",
    ),
    "openvino's precision": (
        {"formats": ("openvino",), "precision": "fp16"},
        "openvino takes precision fp32, got fp16",
    ),
    "int8": ({"int8": "full"}, "int8 is made for the format openvino; add --format openvino"),
    "openvino's stages": (
        {"formats": ("onnx", "openvino"), "forms": "whole-sampler"},
        "the format openvino is written for stages; leave out --whole-sampler, or the format",
    ),
    "opset": ({"opset": 17}, "opset must be 20 to 24, got 17"),
    "no sizes": ({"sizes": ()}, "sizes must not be empty"),
    "psnr": ({"psnr": -3.0}, "psnr: input should be greater than 0, got -3.0"),
    "a misspelt option": ({"batches": 1}, "an export has no option 'batches'; did you mean 'batch'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_for(name):
    values, message = BAD[name]
    with pytest.raises(ArtifactError, match=message) as raised:
        ExportOptions(**values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("package", "extra"), [("openvino", "openvino"), ("nncf", "int8")])
def test_a_package_that_is_missing_is_named_before_the_work(tmp_path, monkeypatch, package, extra):
    """It happened that an export said so once everything else was done and checked."""
    monkeypatch.setitem(sys.modules, "openvino", types.ModuleType("openvino"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}: pip install 'imagine-flash\[{extra}\]'"):
        export_student(tmp_path, tmp_path / "out", options=ExportOptions(formats=("openvino",), int8="weights"))


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_sizes, "512", "a size is WIDTHxHEIGHT such as 512x512, got '512'"),
        (parse_sizes, "512x512,", "got ''"),
        (parse_sizes, "-1x4", "got '-1x4'"),
        (parse_batch, "1-", "a batch is a number or a range such as 1-4, got '1-'"),
        (parse_batch, "two", "got 'two'"),
        (parse_steps, "1;2", "steps are whole numbers such as 1,2,3, got '1;2'"),
    ],
)
def test_what_cannot_be_read(parse, text, message):
    with pytest.raises(ArtifactError, match=message):
        parse(text)


def test_what_is_read(tmp_path: Path):
    assert parse_sizes("512x768, 64x64") == ((768, 512), (64, 64)) and parse_sizes(None) is None
    assert parse_batch("3") == (3, 3) and parse_batch("1-8") == (1, 8) and parse_steps("3, 1") == (3, 1)
    (tmp_path / "prompts.txt").write_text("a fox\n\n a cat \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ("a fox", "a cat")
    for content, message in ((b"\n", "holds no prompts"), (b"\xff\xfe\x00", "it is no UTF-8 text")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            read_prompts(tmp_path / "bad.txt")


@pytest.mark.slow
@pytest.mark.weekly
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_student, tmp_path):
    """A file system that has room for the weights, but not for the graphs, where one can be mounted."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(
            ArtifactError, match=r"cannot write .*out: no space left on device; nothing was changed there"
        ):
            export_student(tiny_student, small / "out", options=ExportOptions(**ONE))
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
