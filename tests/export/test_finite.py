"""The decoder says which of its pictures came without NaN and Inf, however they look."""

# pyright: reportAttributeAccessIssue=false

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from imagine_flash.core.errors import EngineError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.export.onnx import export_decoder, save_graph
from imagine_flash.export.precision import find_islands, lower
from imagine_flash.export.weights import WEIGHTS_FILE, WeightStore
from imagine_flash.folders.files import hash_files
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.tests import pipelines
from imagine_flash.tests.lowering_cases import emulate, run_graph

openvino = pytest.importorskip("openvino", reason="compares with OpenVINO")


def on_onnxruntime(path, x):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        ["images", "finite"], {"latents": x}
    )


def on_openvino(path, x):
    model = openvino.Core().read_model(path)
    model.reshape({"latents": x.shape})
    found = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"latents": x})
    return found["images"], found["finite"]


@pytest.fixture(scope="module", params=["kl", "tiny"])
def black(request, tmp_path_factory):
    """A decoder that draws black, whatever it is given; its graph and torch's module."""
    stages = stages_of(pipelines.build_pipeline(vae=request.param))
    vae, folder = stages.decoder.vae, tmp_path_factory.mktemp("black")
    last = vae.decoder.conv_out if request.param == "kl" else vae.decoder.layers[-1]
    last.weight.data *= 1e-3
    last.bias.data.fill_(-9.0)
    store = WeightStore(folder / WEIGHTS_FILE)
    graph = export_decoder(stages, store, stages.default_size)
    save_graph(graph, folder / "decoder.onnx")
    return stages, graph, store, folder / "decoder.onnx"


def latents() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float32)
    x[1, 0, 0, 0], x[2, 3, 7, 7], x[3, 1, 2, 3] = np.nan, np.inf, -np.inf
    return x


@pytest.mark.parametrize("run", [on_onnxruntime, on_openvino])
def test_black_is_a_picture_and_nan_is_none(black, run):
    stages, _, _, path = black
    images, finite = run(path, latents())
    with torch.inference_mode():
        expected, told = stages.decoder(torch.from_numpy(latents()))
    assert finite.dtype == bool and finite.tolist() == told.tolist() == [True, False, False, False, True]
    assert not images[[0, 4]].any() and not expected[[0, 4]].any()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_adds_up_a_picture_without_overflow(black, precision):
    """The picture's sum is beyond 65504, though none of its values is."""
    _, graph, store, _ = black
    feed = {"latents": np.nan_to_num(latents(), posinf=0, neginf=0)}
    islands = find_islands(graph, store, precision, [feed], limit=np.inf)
    assert "all_finite" in islands.modules
    lowered = emulate(lower(graph, store, precision, islands.modules))
    assert run_graph(lowered, store, [feed])[0]["finite"].all()
    assert not run_graph(lowered, store, [{"latents": latents()}])[0]["finite"].all()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("route", ["stages", "sampler"])
def test_an_engine_delivers_black_and_refuses_nan(artifact, backend, route, monkeypatch):
    with Engine.load(artifact, backend=backend, route=route) as engine:
        inner = engine.backend.run
        seen = []

        def blackened(graph, inputs):
            outputs = inner(graph, inputs)
            seen.append(len(outputs))
            return [np.zeros_like(outputs[0]), *outputs[1:]] if outputs[0].dtype == np.uint8 else outputs

        monkeypatch.setattr(engine.backend, "run", blackened)
        assert not engine.generate(GenerateRequest(prompt="a night")).images.any() and 2 in seen
        monkeypatch.setattr(
            "imagine_flash.engine.engine.step_noise",
            lambda seed, count, shape, step: np.full((count, *shape), np.nan, np.float32),
        )
        with pytest.raises(EngineError, match="gave NaN or Inf"):
            engine.generate(GenerateRequest(prompt="a night"))


def test_an_artifact_of_before_is_judged_by_colour(artifact_copy):
    """Its graphs have no such output; they load, and a picture that is black all over counts as NaN, as it did."""
    manifest = read_artifact_manifest(artifact_copy)
    specs = dict(manifest.graphs)
    for name, spec in manifest.graphs.items():
        if not name.startswith(("decoder", "sampler")):
            continue
        model = onnx.load(artifact_copy / spec.file, load_external_data=False)
        del model.graph.output[1]
        (artifact_copy / spec.file).write_bytes(model.SerializeToString())
        specs[name] = spec.model_copy(update={"outputs": spec.outputs[:1]})
    write_manifest(artifact_copy, manifest.model_copy(update={"graphs": specs, "files": hash_files(artifact_copy)}))
    with Engine.load(artifact_copy, backend="onnxruntime") as engine:
        assert engine.generate(GenerateRequest(prompt="a fox")).images.any()
        engine.backend.run = lambda graph, inputs, run=engine.backend.run: [values * 0 for values in run(graph, inputs)]
        with pytest.raises(EngineError, match="decode gave NaN"):
            engine.generate(GenerateRequest(prompt="a fox"))
