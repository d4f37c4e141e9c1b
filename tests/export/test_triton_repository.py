"""write_triton_repository: configurations that Triton's own definition reads, and models that load where they lie."""

import errno
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.engine import GenerateRequest
from imagine_flash.engine.triton_model import TritonPythonModel
from imagine_flash.export.triton_repository import config_text, prompt_config_text, write_triton_repository
from imagine_flash.folders.files import hash_files
from imagine_flash.folders.manifests import ArtifactManifest, GraphSpec, TensorSpec

EMBEDDED = Path(__file__).parents[2] / "assets" / "emoji" / "artifact"
DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.BOOL: "bool",
}
NUMPY = {
    "tensor(float)": "TYPE_FP32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(bool)": "TYPE_BOOL",
}
TAKEN = ("name", "created_with", "prediction_type", "scheduler", "plans", "noise_correction", "scaling_factor")


def described_copy(folder: Path, batch: tuple[int, int] = (1, 3)) -> ArtifactManifest:
    """Copies the embedded graphs into `folder` and describes them by their own inputs and outputs."""
    shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)
    raw = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    graphs = {path.stem: graph_spec(path) for path in folder.glob("*.onnx")}
    latents, images = graphs["decoder"].inputs[0].shape, graphs["decoder"].outputs[0].shape
    context = graphs["text_encoder"].inputs[0].shape[1]
    described = {
        "latent_channels": latents[1],
        "downscale": int(images[1]) // int(latents[2]),
        "sizes": [images[1:3]],
        "batch": batch,
        "tokenizers": [{"file": "tokenizer.json", "context_length": context}],
        "graphs": graphs,
        "files": hash_files(folder),
        "parity": {},
        "student_sha256": "0" * 64,
    }
    return ArtifactManifest.model_validate({name: raw[name] for name in TAKEN} | described)


def graph_spec(path: Path) -> GraphSpec:
    model = onnx.load(path, load_external_data=False)
    return GraphSpec(
        file=path.name,
        inputs=[tensor_spec(value) for value in model.graph.input],
        outputs=[tensor_spec(value) for value in model.graph.output],
        opset=model.opset_import[0].version,
    )


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=DTYPES[kind.elem_type], shape=shape)


def tree(folder: Path) -> dict[str, str]:
    return hash_files(folder, leave_out=())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    manifest = described_copy(folder)
    return folder, manifest, write_triton_repository(folder, manifest)


@pytest.fixture(scope="module")
def parse():
    """text -> ModelConfig, by the definition that NVIDIA's client ships. The file alone: its package asks for grpc."""
    package = pytest.importorskip("tritonclient", reason="tritonclient has Triton's definition of a configuration")
    from google.protobuf import text_format

    path = Path(package.__file__).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: text_format.Parse(text, module.ModelConfig())


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_mem_reuse = False
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def read(folder: Path, name: str) -> str:
    return (folder / "triton_repository" / name / "config.pbtxt").read_text(encoding="utf-8")


def test_every_graph_is_a_model(written):
    folder, manifest, record = written
    assert set(record["models"]) - {"text_to_image"} == set(manifest.graphs)
    assert set(manifest.graphs) >= {"text_encoder", "denoiser", "decoder", "sampler_1"}
    expected = {
        f"{name}/{file}" for name in manifest.graphs for file in ("config.pbtxt", "1/model.onnx", "1/weights.bin")
    } | {"text_to_image/config.pbtxt", "text_to_image/1/model.py"}
    assert set(tree(folder / "triton_repository")) == expected
    assert all((folder / path).is_file() for model in record["models"].values() for path in model.values())
    with_record = manifest.model_copy(update={"formats": {"triton-repository": record}})
    assert ArtifactManifest.model_validate_json(with_record.model_dump_json()) == with_record


def test_config_says_what_the_model_beside_it_takes_and_gives(written, parse):
    """Loaded where Triton loads it; the configuration's full shape is [-1] + dims, or + reshape where there is one."""
    folder, manifest, _ = written
    for name in manifest.graphs:
        config = parse(read(folder, name))
        model = session(folder / "triton_repository" / name / "1" / "model.onnx")
        assert (config.name, config.platform, config.backend) == (name, "onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size == 3
        for said, real in [(config.input, model.get_inputs()), (config.output, model.get_outputs())]:
            assert [tensor.name for tensor in said] == [tensor.name for tensor in real]
            for tensor, value in zip(said, real, strict=True):
                kind = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
                inner = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
                assert kind == NUMPY[value.type]
                assert ["batch", *inner] == value.shape
                assert len(tensor.dims) >= 1, "Triton knows no empty dims"


def test_scheduling_fields(written, parse):
    folder = written[0]
    config = parse(read(folder, "denoiser"))
    assert list(config.dynamic_batching.preferred_batch_size) == [3]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert config.version_policy.latest.num_versions == 1
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.gpus)) == (1, group.KIND_AUTO, [])
    assert not config.HasField("optimization")


def test_a_model_is_warm_before_it_is_ready(written, parse):
    config = parse(read(written[0], "denoiser"))
    assert [(warm.name, warm.batch_size) for warm in config.model_warmup] == [("batch of 1", 1), ("batch of 3", 3)]
    for warm in config.model_warmup:
        assert set(warm.inputs) == {tensor.name for tensor in config.input}
        for tensor in config.input:
            given = warm.inputs[tensor.name]
            assert (given.data_type, list(given.dims), given.zero_data) == (tensor.data_type, list(tensor.dims), True)


def test_the_model_that_takes_prompts(written, parse):
    folder, manifest, _ = written
    config = parse(read(folder, "text_to_image"))
    assert (config.backend, config.max_batch_size) == ("python", 3)
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["PROMPT"]
    fields = {tensor.name.lower() for tensor in config.input}
    assert fields == {"prompt", "negative_prompt", "seed", "steps", "height", "width", "guidance"}
    assert fields <= GenerateRequest.model_fields.keys()
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [("IMAGES", [64, 64, 3]), ("SEED", [1])]
    assert not config.model_warmup, "the models that it asks may not be there yet"
    code: dict = {}
    exec((folder / "triton_repository/text_to_image/1/model.py").read_text(), code)
    assert code["TritonPythonModel"] is TritonPythonModel
    wide = manifest.model_copy(update={"sizes": [(64, 64), (64, 128)]})
    assert list(parse(prompt_config_text(wide)).output[0].dims) == [-1, -1, 3]


def test_no_prompts_without_the_stages(tmp_path):
    manifest = described_copy(tmp_path)
    samplers = {name: spec for name, spec in manifest.graphs.items() if name.startswith("sampler_")}
    record = write_triton_repository(tmp_path, manifest.model_copy(update={"graphs": samplers}))
    assert set(record["models"]) == set(samplers)


def test_timestep_is_batch_by_one_to_the_client(written, parse):
    timestep = next(tensor for tensor in parse(read(written[0], "denoiser")).input if tensor.name == "timestep")
    assert list(timestep.dims) == [1] and timestep.HasField("reshape") and list(timestep.reshape.shape) == []


def test_batch_of_one_is_not_batched(parse):
    spec = GraphSpec(file="x.onnx", inputs=[], outputs=[], opset=23)
    assert not parse(config_text("x", spec, 1)).HasField("dynamic_batching")
    assert parse(config_text("x", spec, 2)).HasField("dynamic_batching")


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "grün", "名", "a'b}", "\x01", "\\n7"])
def test_names_survive_the_text_format(name, parse):
    tensor = TensorSpec(name=name, dtype="float16", shape=["batch", "length", 3])
    config = parse(config_text(name, GraphSpec(file="x.onnx", inputs=[tensor], outputs=[tensor], opset=23), 4))
    assert config.name == config.input[0].name == config.output[0].name == name
    assert list(config.input[0].dims) == [-1, 3] and not config.input[0].HasField("reshape")


def test_models_share_one_copy_of_the_weights_and_compute_the_same(written):
    folder, manifest, record = written
    copies = {(folder / "triton_repository" / name / "1" / "weights.bin").stat().st_ino for name in manifest.graphs}
    assert record["linked"] is (len(copies) == 1)
    assert (folder / "weights.bin").stat().st_nlink == 1, "the onnx package refuses linked weights"
    onnx.load(folder / "decoder.onnx")
    latents = np.random.default_rng(0).standard_normal((2, *manifest.latent_shape), dtype=np.float32)
    here, there = folder / "decoder.onnx", folder / "triton_repository" / "decoder" / "1" / "model.onnx"
    images = [np.asarray(session(path).run(None, {"latents": latents})[0]) for path in (here, there)]
    assert np.array_equal(images[0], images[1])


@pytest.mark.parametrize("way", ["dots", "symlink"])
def test_onnxruntime_needs_the_weights_in_the_models_folder(tmp_path, way):
    """Why weights.bin is linked into every model folder. Drop the links when this fails."""
    shutil.copy(EMBEDDED / "weights.bin", tmp_path)
    (tmp_path / "model").mkdir()
    model = onnx.load(EMBEDDED / "decoder.onnx", load_external_data=False)
    if way == "symlink":
        (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    else:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "../weights.bin" if entry.key == "location" else entry.value
    (tmp_path / "model" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="escapes model directory"):
        session(tmp_path / "model" / "model.onnx")


def test_copies_where_the_file_system_refuses_links(tmp_path, monkeypatch):
    manifest = described_copy(tmp_path)

    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    record = write_triton_repository(tmp_path, manifest)
    assert record["linked"] is False
    copy = tmp_path / "triton_repository" / "decoder" / "1"
    assert {path.stat().st_nlink for path in (tmp_path / "triton_repository").rglob("weights.bin")} == {1}
    assert len(session(copy / "model.onnx").get_inputs()) == 1


def test_asked_twice_replaces_the_old_one_whole(tmp_path):
    manifest = described_copy(tmp_path)
    write_triton_repository(tmp_path, manifest)
    first = tree(tmp_path / "triton_repository")
    stale = tmp_path / "triton_repository" / "denoiser" / "2" / "model.onnx"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    write_triton_repository(tmp_path, manifest)
    assert tree(tmp_path / "triton_repository") == first


def with_dtype(manifest: ArtifactManifest, dtype: str) -> ArtifactManifest:
    return with_input(manifest, TensorSpec(name="latents", dtype=dtype, shape=["batch", 24, 8, 8]))


def with_input(manifest: ArtifactManifest, tensor: TensorSpec) -> ArtifactManifest:
    spec = manifest.graphs["decoder"].model_copy(update={"inputs": [tensor]})
    return manifest.model_copy(update={"graphs": manifest.graphs | {"decoder": spec}})


def fixed(manifest: ArtifactManifest) -> ArtifactManifest:
    return with_input(manifest, TensorSpec(name="latents", dtype="float32", shape=[1, 24, 8, 8]))


def spoil(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()  # its other name in the repository stays whole
    (folder / "decoder.onnx").write_bytes(b"junk")


BAD = {
    "no graph": (lambda folder: (folder / "decoder.onnx").unlink(), None, r"decoder\.onnx is missing; run"),
    "no weights": (lambda folder: (folder / "weights.bin").unlink(), None, r"weights\.bin is missing; run"),
    "no ONNX": (spoil, None, r"decoder\.onnx is no ONNX graph"),
    "dtype": (None, lambda manifest: with_dtype(manifest, "bfloat16"), "decoder: latents is bfloat16, which Triton's"),
    "fixed batch": (None, fixed, r"first axis of latents must be a free batch, got shape \[1, 24, 8, 8\]"),
}


@pytest.mark.parametrize(("damage", "change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_the_old_repository(tmp_path, damage, change, message):
    manifest = described_copy(tmp_path)
    write_triton_repository(tmp_path, manifest)
    before = tree(tmp_path / "triton_repository")
    if damage:
        damage(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ArtifactError, match=message) as caught:
        write_triton_repository(tmp_path, change(manifest) if change else manifest)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path / "triton_repository") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_weights_outside_the_folder_are_refused(tmp_path):
    manifest = described_copy(tmp_path)
    model = onnx.load(tmp_path / "decoder.onnx", load_external_data=False)
    entry = next(e for t in model.graph.initializer for e in t.external_data if e.key == "location")
    entry.value = "../secret"
    (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"keeps weights in '\.\./secret', outside its folder"):
        write_triton_repository(tmp_path, manifest)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    manifest = described_copy(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"needs onnx: pip install 'imagine-flash\[export\]'"):
        write_triton_repository(tmp_path, manifest)
    assert not (tmp_path / "triton_repository").exists()
