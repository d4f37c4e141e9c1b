"""write_openvino: IRs that equal the ONNX graphs, hold the same weights once, and are refused where they differ."""

import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from imagine_flash.core.errors import ArtifactError, MissingExtraError, ParityError
from imagine_flash.core.update import sample
from imagine_flash.export.openvino import MAX_PSNR, _check_int8, _checked, difference, write_openvino
from imagine_flash.folders.files import hash_files
from imagine_flash.folders.manifests import ArtifactManifest
from imagine_flash.tests.export.test_triton_repository import described_copy

ov = pytest.importorskip("openvino", reason="writes and runs OpenVINO IR")
STAGES = ("text_encoder", "denoiser", "decoder")
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def core():
    return ov.Core()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    manifest = described_copy(folder)
    return folder, manifest, write_openvino(folder, manifest)


def compiled(core, folder, name, batch, config=F32):
    model = core.read_model(folder / "openvino" / f"{name}.xml")
    model.reshape({port: [batch, *[int(str(size)) for size in list(port.partial_shape)[1:]]] for port in model.inputs})
    return core.compile_model(model, "CPU", config)


def stages_written(folder):
    return sorted(path.name for path in (folder / "openvino").iterdir())


def test_stages_are_written_and_samplers_left_out(written):
    folder, manifest, record = written
    assert stages_written(folder) == sorted(f"{name}.{end}" for name in STAGES for end in ("xml", "bin"))
    assert record["openvino"] == ov.__version__ and record["checked_batches"] == [1, 3]
    assert tuple(record["graphs"]) == STAGES
    for graph in record["graphs"].values():
        assert (folder / graph["file"]).is_file() and (folder / graph["weights"]).is_file()
    with_record = manifest.model_copy(update={"formats": {"openvino": record}})
    assert ArtifactManifest.model_validate_json(with_record.model_dump_json()) == with_record


def test_errors_are_recorded_by_hint(written, core):
    record = written[2]
    hints = {"f32"} | ({"bf16"} & {kind.lower() for kind in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")})
    assert record["inference_precision"] == "f32"
    for graph, outputs in zip(STAGES, ({"embeddings"}, {"m"}, {"images", "finite"}), strict=True):
        errors = record["graphs"][graph]["errors"]
        assert set(errors) == hints and set(errors["f32"]) == outputs
    assert record["graphs"]["denoiser"]["errors"]["f32"]["m"]["max"] <= 1e-4
    assert record["graphs"]["decoder"]["errors"]["f32"]["images"]["max"] <= 1


def test_batch_stays_free_and_all_else_fixed(written, core):
    folder, manifest, _ = written
    for name in STAGES:
        model = core.read_model(folder / "openvino" / f"{name}.xml")
        for said, ports in (
            (manifest.graphs[name].inputs, model.inputs),
            (manifest.graphs[name].outputs, model.outputs),
        ):
            assert [port.any_name for port in ports] == [tensor.name for tensor in said]
            for tensor, port in zip(said, ports, strict=True):
                assert port.partial_shape[0].is_dynamic
                assert [int(str(size)) for size in list(port.partial_shape)[1:]] == tensor.shape[1:]


def test_weights_are_those_of_the_onnx_bit_for_bit_in_the_same_types(written, core):
    folder, _, _ = written
    for name in STAGES:
        model = core.read_model(folder / "openvino" / f"{name}.xml")
        constants = (op for op in model.get_ops() if op.get_type_name() == "Constant" and op.get_byte_size() > 1024)
        held = {(str(op.data.dtype), op.data.tobytes()) for op in constants}
        graph = onnx.load(folder / f"{name}.onnx").graph
        values = [
            numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.external_data or tensor.raw_data
        ]
        large = [value for value in values if value.nbytes > 1024 and value.dtype.kind == "f"]
        assert large and all((str(value.dtype), value.tobytes()) in held for value in large)
    bins = sum((folder / "openvino" / f"{name}.bin").stat().st_size for name in STAGES)
    assert bins <= 1.01 * (folder / "weights.bin").stat().st_size


def test_casts_of_the_weights_are_folded_when_it_compiles(written, core):
    runtime = compiled(core, written[0], "denoiser", 1).get_runtime_model()
    kinds = {str(op.get_rt_info()["layerType"].astype(str)) for op in runtime.get_ops()}
    assert "Convolution" in kinds and "Convert" not in kinds


@pytest.mark.parametrize("batch", [1, 2, 5], ids=["the smallest", "in between", "beyond the checked"])
def test_stages_draw_the_pictures_of_the_whole_sampler_in_onnxruntime(written, core, batch):
    """Another path to the same picture: the unrolled graph, which write_openvino never reads."""
    folder, manifest, _ = written
    random = np.random.default_rng(batch)
    ids = random.integers(0, 50, (batch, manifest.tokenizers[0].context_length))
    noise = random.standard_normal((batch, *manifest.latent_shape), dtype=np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_mem_reuse = 1, False
    session = onnxruntime.InferenceSession(folder / "sampler_3.onnx", options, providers=["CPUExecutionProvider"])
    expected = np.asarray(session.run(None, {"input_ids": ids, "noise": noise})[0])
    run = {name: compiled(core, folder, name, batch) for name in STAGES}
    embeddings = run["text_encoder"]({"input_ids": ids})["embeddings"]

    def denoiser(x, t):
        return run["denoiser"]({"latents": x, "timestep": np.full(batch, t, np.float32), "embeddings": embeddings})["m"]

    x = sample(denoiser, noise, manifest.update_tables()[3])
    images = run["decoder"]({"latents": x})["images"]
    assert images.dtype == np.uint8 and images.shape == expected.shape and images.std() > 5
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1


LEVELS = np.array([0, 100, 200], np.uint8)
DIFFERENCES = {
    "one level": (LEVELS + np.uint8(1), LEVELS, {"max": 1.0, "psnr": 20 * np.log10(255)}),
    "levels do not wrap": (np.array([0, 0], np.uint8), np.array([255, 255], np.uint8), {"max": 255.0, "psnr": 0.0}),
    "equal images": (LEVELS, LEVELS, {"max": 0.0, "psnr": MAX_PSNR}),
    "floats": (np.array([3, 0], np.float32), np.array([3, -4], np.float32), {"max": 1.0, "rms": 0.8}),
    "zeros": (np.array([0.5, 0], np.float32), np.array([0, 0], np.float32), {"max": 0.5, "rms": np.sqrt(0.125)}),
    "NaN": (np.array([np.nan, 0], np.float32), np.array([1, 1], np.float32), {"max": None, "rms": None}),
    "Inf": (np.array([np.inf, 0], np.float32), np.array([1, 1], np.float32), {"max": None, "rms": None}),
}


@pytest.mark.parametrize(("got", "expected", "found"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_difference(got, expected, found):
    assert difference(got, expected) == pytest.approx(found)


WRONG = {
    "beyond the tolerance": (
        "text_encoder",
        "embeddings",
        lambda x: x + np.float32(3e-4) * np.abs(x).max(),
        r"more than 0\.0001",
    ),
    "NaN": ("text_encoder", "embeddings", lambda x: x * np.float32("nan"), "NaN or Inf"),
    "two levels": (
        "decoder",
        "images",
        lambda x: np.where(x > 127, x - 2, x + 2).astype(np.uint8),
        "more than 1 levels",
    ),
}


@pytest.mark.parametrize(("name", "output", "change", "message"), WRONG.values(), ids=WRONG)
def test_an_ir_that_differs_is_refused(written, core, name, output, change, message):
    folder, manifest, _ = written
    inputs = {}
    for tensor in manifest.graphs[name].inputs:
        values = np.random.default_rng(1).standard_normal((1, *tensor.shape[1:]))
        inputs[tensor.name] = np.abs(values).astype(tensor.dtype)  # token ids too
    right = compiled(core, folder, name, 1)(inputs)[output]
    path = folder / "openvino" / f"{name}.xml"
    _checked(core, path, name, [(inputs, {output: right})], ["f32"])
    with pytest.raises(ParityError, match=rf"^{name}: {output} in OpenVINO at f32 .*{message}"):
        _checked(core, path, name, [(inputs, {output: right}), (inputs, {output: change(right)})], ["f32"])


def test_int8_limit():
    _check_int8("decoder", {"images": {"max": 30.0, "psnr": 25.0}})
    _check_int8("denoiser", {"m": {"max": 0.5, "rms": 0.5}})
    with pytest.raises(ParityError, match=r"^decoder: images with int8 weights: a PSNR of 24\.9 dB, must be 25 dB"):
        _check_int8("decoder", {"images": {"max": 30.0, "psnr": 24.9}})
    with pytest.raises(ParityError, match=r"^denoiser: m with int8 weights: NaN or Inf"):
        _check_int8("denoiser", {"m": {"max": None, "rms": None}})


@pytest.mark.slow
@pytest.mark.weekly  # test_int8.py has weights and activations
def test_int8_weights(written, tmp_path, core):
    pytest.importorskip("nncf", reason="nncf compresses weights to int8")
    full = (written[0] / "openvino" / "denoiser.bin").stat().st_size
    manifest = described_copy(tmp_path)
    environment = dict(os.environ)
    record = write_openvino(tmp_path, manifest, int8="weights")
    assert dict(os.environ) == environment
    assert (tmp_path / "openvino" / "denoiser.bin").stat().st_size < 0.6 * full
    assert record["weights"] == "int8_asym" and record["nncf"]
    assert 25 <= record["graphs"]["decoder"]["errors"]["f32"]["images"]["psnr"] < MAX_PSNR
    assert 1e-4 < record["graphs"]["denoiser"]["errors"]["f32"]["m"]["rms"] < 0.1
    model = core.read_model(tmp_path / "openvino" / "denoiser.xml")
    assert "u8" in {op.get_element_type().to_string() for op in model.get_ops() if op.get_type_name() == "Constant"}


@pytest.mark.slow
def test_asked_twice_replaces_the_old_one_whole(tmp_path):
    manifest = described_copy(tmp_path, batch=(1, 1))
    assert write_openvino(tmp_path, manifest)["checked_batches"] == [1]
    names = stages_written(tmp_path)
    first = {name: sha for name, sha in hash_files(tmp_path / "openvino").items() if name.endswith(".bin")}
    (tmp_path / "openvino" / "denoiser_b4.xml").write_text("old")
    write_openvino(tmp_path, manifest)
    assert stages_written(tmp_path) == names
    assert hash_files(tmp_path / "openvino").items() >= first.items() and len(first) == len(STAGES)


def only(*names):
    def change(manifest):
        kept = {name: spec for name, spec in manifest.graphs.items() if name in names}
        return manifest.model_copy(update={"graphs": kept})

    return change


def precision(manifest):
    return manifest.model_copy(update={"precision": "fp16"})


BAD = {
    "no graph": ("decoder.onnx", None, None, r"decoder\.onnx is missing; run 'imagine-flash export' again"),
    "damaged graph": (
        "decoder.onnx",
        b"junk",
        None,
        r"cannot read .*decoder\.onnx .*; run 'imagine-flash export' again",
    ),
    "no weights": ("weights.bin", None, None, r"cannot read .*text_encoder\.onnx .*; run"),
    "samplers only": (None, None, only("sampler_1"), "holds whole-sampler graphs only; OpenVINO is written for stages"),
    "half precision": (None, None, precision, "export with precision fp32 for it, got fp16"),
}


@pytest.mark.parametrize(("file", "content", "change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_the_old_files(tmp_path, file, content, change, message):
    manifest = described_copy(tmp_path, batch=(1, 1))
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "denoiser.xml").write_text("old")
    if file:
        (tmp_path / file).unlink()
    if content:
        (tmp_path / file).write_bytes(content)
    before = hash_files(tmp_path)
    with pytest.raises(ArtifactError, match=message) as caught:
        write_openvino(tmp_path, change(manifest) if change else manifest)
    assert "\n" not in str(caught.value)
    assert hash_files(tmp_path) == before


@pytest.mark.parametrize(("package", "extra"), [("openvino", "openvino"), ("nncf", "int8")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, extra):
    manifest = described_copy(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}: pip install 'imagine-flash\[{extra}\]'"):
        write_openvino(tmp_path, manifest, int8="weights")
    assert not (tmp_path / "openvino").exists()
