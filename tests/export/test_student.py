"""export_student: what lies in the artifact folder, that it equals torch, and that nothing is half-written."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from imagine_flash.core.errors import ArtifactError, ImagineFlashError
from imagine_flash.core.update import sample
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.folders.files import hash_files, hash_folder
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests import pipelines

SAMPLERS = [f"sampler_{n}{text}" for n in (1, 2, 3) for text in ("", "_from_embeddings")]
STAGE_GRAPHS = ["text_encoder", "denoiser", "decoder", "image_encoder"]
GRAPHS = [*STAGE_GRAPHS, *SAMPLERS]
SIZE = (64, 64)


@pytest.fixture(scope="module")
def stages(student):
    return load_stages(student)


def run(folder: Path, graph: str, **inputs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_reuse = False
    session = onnxruntime.InferenceSession(folder / f"{graph}.onnx", options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def inputs(stages, batch: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    prompts = [pipelines.CAPTIONS[(seed + i) % len(pipelines.CAPTIONS)] for i in range(batch)]
    noise = np.random.default_rng(seed).standard_normal((batch, *stages.latent_shape(SIZE)), dtype=np.float32)
    return stages.encode_prompts(prompts)["input_ids"].numpy(), noise


@torch.inference_mode()
def torch_sampler(stages, manifest, steps: int, ids: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition: torch networks around the reference update. Latents and images."""
    conditions, network = stages.text_encoder(torch.from_numpy(ids)), stages.denoiser(SIZE)
    x = sample(
        lambda x, t: network(x, torch.full((len(x),), float(t)), *conditions),
        torch.from_numpy(noise),
        manifest.update_tables()[steps],
    )
    return x.numpy(), stages.decoder(x)[0].numpy()


def test_manifest_describes_the_folder(student, artifact):
    manifest = read_artifact_manifest(artifact)
    assert set(manifest.graphs) == set(GRAPHS)
    assert manifest.name == "tiny" and manifest.latent_shape == (4, 8, 8) and manifest.image_size == SIZE
    assert manifest.scaling_factor == 0.5 and manifest.prediction_type == "v_prediction"
    assert manifest.plans == {1: [999], 2: [999, 499], 3: [999, 666, 333]}
    assert manifest.student_sha256 == hash_folder(student)
    assert manifest.graphs["sampler_3"].inputs[1].shape == ["batch", 4, 8, 8]
    assert [spec.name for spec in manifest.graphs["sampler_3_from_embeddings"].inputs] == ["embeddings", "noise"]
    assert manifest.graphs["denoiser"].nodes == {"Attention": 8, "GroupNormalization": 21, "LayerNormalization": 12}
    assert manifest.graphs["sampler_3"].outputs[0].dtype == "uint8"
    assert {"fox", "rocket", "a"} <= set(manifest.tokenizers[0].known_words)
    assert not {"x", "zebra", "ound"} & set(manifest.tokenizers[0].known_words)
    listed = set(manifest.files) | {"manifest.json"}
    found = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    assert listed == found, "a file without a hash"


def test_parity_is_recorded_for_every_graph(artifact):
    parity = read_artifact_manifest(artifact).parity
    assert set(parity) >= set(GRAPHS)
    assert max(parity["denoiser"]["m"], *(parity[f"stages_{n}"]["latents"] for n in (1, 2, 3))) <= 1e-4
    assert max(parity[f"sampler_{n}"]["images"] for n in (1, 2, 3)) <= 1


@pytest.mark.parametrize("batch", [1, 2, 5], ids=["one image", "the traced batch", "another batch"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_whole_sampler_equals_torch(artifact, stages, steps, batch):
    manifest = read_artifact_manifest(artifact, verify=False)
    ids, noise = inputs(stages, batch)
    images = run(artifact, f"sampler_{steps}", input_ids=ids, noise=noise)
    expected = torch_sampler(stages, manifest, steps, ids, noise)[1]
    assert images.shape == (batch, 64, 64, 3) and images.dtype == np.uint8
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert images.std() > 5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_stage_graphs_equal_torch_and_the_whole_sampler(artifact, stages, steps):
    manifest = read_artifact_manifest(artifact, verify=False)
    ids, noise = inputs(stages, 3)
    embeddings = run(artifact, "text_encoder", input_ids=ids)

    def denoiser(x, t):
        return run(artifact, "denoiser", latents=x, timestep=np.full(3, t, np.float32), embeddings=embeddings)

    x = sample(denoiser, noise, manifest.update_tables()[steps])
    latents, images = torch_sampler(stages, manifest, steps, ids, noise)
    assert np.abs(x - latents).max() <= 1e-4
    by_stage = run(artifact, "decoder", latents=x).astype(int)
    assert np.abs(by_stage - images).max() <= 1
    assert np.abs(by_stage - run(artifact, f"sampler_{steps}", input_ids=ids, noise=noise)).max() <= 1


def test_images_of_a_batch_do_not_mix(artifact, stages):
    ids, noise = inputs(stages, 2)
    both = run(artifact, "sampler_3", input_ids=ids, noise=noise).astype(int)
    alone = [run(artifact, "sampler_3", input_ids=ids[i : i + 1], noise=noise[i : i + 1])[0] for i in range(2)]
    assert np.abs(both - np.stack(alone)).max() <= 1


@torch.inference_mode()
def test_the_image_encoder_equals_the_pipelines_own(artifact, student):
    """As diffusers' image to image encodes a picture: the distribution's mode, scaled."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    vae: Any = AutoencoderKL.from_pretrained(student / "vae")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(images.astype(np.float32) / 255)
    expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    np.testing.assert_allclose(run(artifact, "image_encoder", images=images), expected.numpy(), atol=1e-5)


def test_images_of_one_batch_may_be_at_different_steps(artifact, stages):
    ids, noise = inputs(stages, 2)
    embeddings = run(artifact, "text_encoder", input_ids=ids)
    told = np.array([999, 333], dtype=np.float32)
    mixed = run(artifact, "denoiser", latents=noise, timestep=told, embeddings=embeddings)
    for i in range(2):
        one = {"latents": noise[i : i + 1], "timestep": told[i : i + 1], "embeddings": embeddings[i : i + 1]}
        assert np.abs(run(artifact, "denoiser", **one)[0] - mixed[i]).max() < 1e-5


def test_weights_are_stored_once_in_half_precision(student, artifact):
    networks = {file.parent.name: load_file(file) for file in student.rglob("*.safetensors")}
    used = sum(tensor.numel() for tensors in networks.values() for tensor in tensors.values())
    size = (artifact / "weights.bin").stat().st_size
    assert used * 1.9 < size < 2 * used, "ten graphs, one copy, two bytes a weight"
    for graph in GRAPHS:
        model = onnx.load(artifact / f"{graph}.onnx", load_external_data=False)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert outside and {t.data_type for t in outside} == {onnx.TensorProto.FLOAT16}
        assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {"weights.bin"}


def test_no_file_tells_about_the_machine_that_made_it(student, artifact):
    places = [b"site-packages", b"/tmp", b"/home", b".py", os.fsencode(Path.cwd()), os.fsencode(student.parent)]
    for path in artifact.rglob("*"):
        if path.is_file() and path.name != "weights.bin":
            assert not [place for place in places if place in path.read_bytes()], path.name
    for graph in GRAPHS:
        model = onnx.load(artifact / f"{graph}.onnx", load_external_data=False)
        assert not model.metadata_props and not any(n.metadata_props or n.doc_string for n in model.graph.node)


@pytest.mark.slow
@pytest.mark.weekly
def test_export_is_deterministic_and_replaces_the_old_artifact(student, artifact, tmp_path):
    (tmp_path / "out").mkdir()
    again = export_student(student, tmp_path / "out", options=ExportOptions(name="tiny", batch=(1, 3)))
    assert again.files == read_artifact_manifest(artifact).files


@pytest.mark.slow
@pytest.mark.weekly
def test_float32_students_and_tiny_autoencoders_are_exported_without_loss(tmp_path):
    student = pipelines.build_student(tmp_path / "student", half=False, vae="tiny")
    manifest = export_student(student, tmp_path / "out", options=ExportOptions(steps=(1,), batch=(1, 2)))
    assert manifest.name == "student" and manifest.scaling_factor == 1.0
    model = onnx.load(tmp_path / "out" / "denoiser.onnx", load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert onnx.TensorProto.FLOAT in {t.data_type for t in outside}


def test_two_exports_to_one_folder(student, tmp_path):
    from filelock import FileLock

    from imagine_flash.export.student import _lock_of

    lock = _lock_of(tmp_path / "out")
    with FileLock(lock), pytest.raises(ArtifactError, match=r"another export is writing .*out"):
        export_student(student, tmp_path / "out")
    assert lock.exists(), "a lock file that is removed may be another process's"


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("forms", ["stages", "whole-sampler"])
def test_graphs_of_one_form_alone(student, artifact, tmp_path, forms):
    manifest = export_student(student, tmp_path / "out", options=ExportOptions(forms=forms, batch=(1, 1), steps=(2,)))
    whole = {"sampler_2", "sampler_2_from_embeddings"}
    assert set(manifest.graphs) == (whole if forms == "whole-sampler" else set(STAGE_GRAPHS))
    from imagine_flash.engine import Engine, GenerateRequest

    picture = Engine.load(tmp_path / "out").generate(GenerateRequest(prompt="a fox", seed=3)).images
    other = Engine.load(artifact).generate(GenerateRequest(prompt="a fox", seed=3, steps=2)).images
    assert np.abs(picture.astype(int) - other).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_outside_the_folder_are_refused_in_one_line(artifact_copy, backend):
    """Even with a manifest that vouches for the graph: nobody vouches for a file beside the folder."""
    shutil.copy(artifact_copy / "weights.bin", artifact_copy.parent / "outside.bin")
    model = onnx.load(artifact_copy / "denoiser.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    (artifact_copy / "denoiser.onnx").write_bytes(model.SerializeToString())
    manifest = read_artifact_manifest(artifact_copy, verify=False)
    write_manifest(artifact_copy, manifest.model_copy(update={"files": hash_files(artifact_copy)}))
    from imagine_flash.engine import Engine, GenerateRequest

    with pytest.raises(ImagineFlashError, match="cannot run denoiser") as raised:
        Engine.load(artifact_copy, backend=backend).generate(GenerateRequest(prompt="a fox"))
    assert "\n" not in str(raised.value)


def test_a_killed_export_leaves_the_old_artifact_whole(student, artifact_copy):
    before = hash_folder(artifact_copy)
    code = f"from imagine_flash.export import export_student; export_student({str(student)!r}, {str(artifact_copy)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any((folder / "weights.bin").exists() for folder in artifact_copy.parent.glob(".artifact.tmp-*")):
            break  # it is writing
        time.sleep(0.02)
    assert process.poll() is None, "the export ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hash_folder(artifact_copy) == before
    read_artifact_manifest(artifact_copy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root, artifact: root / "nowhere", "does not exist"),
        (lambda root, artifact: root, "is empty"),
        (lambda root, artifact: artifact, "already exported|not a student"),
    ],
    ids=["missing", "empty", "another kind"],
)
def test_what_is_no_student_is_refused_in_one_line(tmp_path, artifact, make, message):
    (tmp_path / "in").mkdir()
    with pytest.raises(ArtifactError) as raised:
        export_student(make(tmp_path / "in", artifact), tmp_path / "out")
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_student_is_not_overwritten_by_its_artifact(student):
    before = hash_folder(student)
    with pytest.raises(ArtifactError, match="refusing to replace"):
        export_student(student, student)
    assert hash_folder(student) == before
