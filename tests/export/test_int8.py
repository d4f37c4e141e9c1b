"""`export --format openvino --int8 full`: which layers compute in 8 bits, and that the pictures decide."""

import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError, ParityError
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.export.cases import Case
from imagine_flash.export.int8 import calibration, check_pictures, left_out
from imagine_flash.folders.reading import read_artifact_manifest

ov = pytest.importorskip("openvino", reason="reads the graphs that are quantised")
SHORT = {"name": "tiny", "batch": (1, 1), "forms": "stages", "image_encoder": False, "steps": (1, 2)}


def test_the_layers_that_cost_likeness_are_left_out(tiny_artifact):
    model = ov.Core().read_model(tiny_artifact / "denoiser.onnx")
    layers = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() in ("MatMul", "Convolution")]
    out = left_out(model)
    assert set(out) < set(layers)
    for part in ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v"):
        assert [name for name in layers if part in name], part
        assert all(name in out for name in layers if part in name), part
    for part in ("resnets.0.conv1", "attn1.to_q", "attn2.to_q", "ff.net.0"):
        assert [name for name in layers if part in name], part
        assert not any(part in name for name in out), part


def test_calibration_sees_what_the_loop_sees(tiny_artifact):
    manifest = read_artifact_manifest(tiny_artifact)
    found = calibration(tiny_artifact, manifest, manifest.image_size, ["a fox", "boat", "a cat"])
    times = [float(feed["timestep"][0]) for feed in found["denoiser"]]
    schedule = [
        manifest.schedule.network_time(t) for table in manifest.update_tables().values() for t in table.timesteps
    ]
    assert times == [*schedule, schedule[0]]  # the empty prompt and three more, a plan each in turn: 1, 2, 3, 1 steps
    assert [feed["latents"].shape for feed in found["decoder"]] == 4 * [(1, *manifest.latent_shape)]
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        drawn = engine.generate(GenerateRequest(prompt="a fox", steps=2, seed=1)).images[0]
        decoded = engine.backend.decode(found["decoder"][1]["latents"])[0][0]
    assert np.abs(decoded.astype(int) - drawn).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "openvino"}, r"holds nothing in int8; run: imagine-flash export STUDENT OUT .*--int8 full"),
        ({"backend": "onnxruntime"}, r"onnxruntime does not compute in int8; take the backend openvino"),
    ],
)
def test_int8_where_there_is_none(tiny_artifact, options, message):
    with pytest.raises(ArtifactError, match=message) as found:
        Engine.load(tiny_artifact, precision="int8", **options)
    assert "\n" not in str(found.value)


@pytest.mark.slow
def test_eight_bits_draw_nearly_what_torch_drew(tiny_student, tmp_path):
    pytest.importorskip("nncf", reason="quantises the networks")
    options = ExportOptions(**SHORT, formats=("onnx", "openvino"), int8="full")
    manifest = export_student(tiny_student, tmp_path / "artifact", options=options)
    record = manifest.formats["openvino"]
    assert manifest.holds_int8 and record["weights"] == "int8_sym" and record["activations"] == "int8"
    assert tuple(record["graphs"]) == ("denoiser", "decoder") and 20 <= record["pictures"]["psnr"] < 100
    model = ov.Core().read_model(tmp_path / "artifact" / "openvino" / "denoiser.xml")
    kinds = [op.get_type_name() for op in model.get_ops()]
    assert kinds.count("FakeQuantize") > 20 and all(port.partial_shape[0].is_dynamic for port in model.inputs)
    asked = GenerateRequest(prompt="a fox", steps=2, seed=3)
    drawn = {}
    for precision in ("auto", "int8", "fp32"):
        with Engine.load(tmp_path / "artifact", backend="openvino", precision=precision) as engine:
            assert ("int8" in engine.describe()) == (precision != "fp32")
            drawn[precision] = engine.generate(asked).images[0].astype(int)
    assert (drawn["auto"] == drawn["int8"]).all()
    assert 0 < np.square(drawn["int8"] - drawn["fp32"]).mean() < 255**2 / 10**2  # 20 dB


def test_pictures_too_far_from_torch_are_refused(tiny_artifact):
    """The graphs themselves against a picture that torch did not draw."""
    manifest = read_artifact_manifest(tiny_artifact)
    core, batch = ov.Core(), manifest.batch[0]
    text = core.compile_model(tiny_artifact / "text_encoder.onnx", "CPU")
    tokens = {"input_ids": torch.full((batch, manifest.tokenizers[0].context_length), 3)}
    conditions = (torch.from_numpy(text(tokens["input_ids"].numpy())[0]),)

    def compiled(graph, _):
        run = core.compile_model(tiny_artifact / f"{graph}.onnx", "CPU")
        return lambda feed: {name: run(feed)[name] for name in ("m", "images", "finite") if name in outputs(run)}

    def outputs(run):
        return {name for port in run.outputs for name in port.names}

    noise = torch.from_numpy(step_noise(0, batch, manifest.latent_shape, 0))
    images = {1: torch.zeros(batch, *manifest.image_size, 3, dtype=torch.uint8)}
    case = Case(
        ("a fox",), 0, manifest.image_size, tokens, noise, noise[:, None], images[1], conditions, {}, {}, {}, images, {}
    )
    with pytest.raises(
        ParityError, match=r"^int8: images have a PSNR of .*; calibrate on prompts such as yours"
    ) as found:
        check_pictures(compiled, manifest, [case], 20.0)
    assert "\n" not in str(found.value)
    assert check_pictures(compiled, manifest, [case], 1.0) > 1.0
