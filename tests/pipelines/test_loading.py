"""Students as stages: half weights that stay half in memory, variants, and a sampler that nobody named."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from safetensors.torch import load_file, save_file

from imagine_flash.core.errors import ArtifactError
from imagine_flash.export.onnx import export_denoiser, export_text_encoder
from imagine_flash.export.precision import run_graph
from imagine_flash.export.weights import WEIGHTS_FILE, WeightStore
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.pipelines.half import compute_in_float32, stored_dtype
from imagine_flash.pipelines.loading import load_pipeline, load_stages
from imagine_flash.tests import architectures, pipelines
from imagine_flash.tests.lowering_cases import export

SIZE = (64, 64)


@pytest.fixture(scope="module")
def both(tiny_student):
    return load_stages(tiny_student), load_stages(tiny_student, keep_half=True)


def feeds(stages):
    tokens = stages.example_tokens(2)
    with torch.inference_mode():
        conditions = stages.text_encoder(*tokens.values())
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return tokens, {"latents": x, "timestep": torch.tensor([999.0, 10.0]), "embeddings": conditions[0]}


def test_the_answers_are_the_same_to_the_bit(both):
    wide, half = both
    kept = [p for p in half.denoiser(SIZE).parameters() if p.dtype == torch.float16]
    assert kept and not [p for p in wide.denoiser(SIZE).parameters() if p.dtype == torch.float16]
    tokens, inputs = feeds(wide)
    with torch.inference_mode():
        assert torch.equal(half.text_encoder(*tokens.values())[0], wide.text_encoder(*tokens.values())[0])
        assert torch.equal(half.denoiser(SIZE)(*inputs.values()), wide.denoiser(SIZE)(*inputs.values()))


@pytest.mark.slow
@pytest.mark.weekly  # the answers are the same to the bit, and every export is compared with torch
def test_the_graphs_are_the_same(both, tmp_path):
    """The weights' Casts and Transposes are gone, the weights stored once and as before."""
    graphs, sizes, outputs = [], [], []
    for stages, name in zip(both, ("wide", "half"), strict=True):
        (tmp_path / name).mkdir()
        store = WeightStore(tmp_path / name / WEIGHTS_FILE)
        with torch.inference_mode():
            exported = [export_text_encoder(stages, store), export_denoiser(stages, store, SIZE)]
        graphs.append([Counter(node.op_type for node in stage.graph.node) for stage in exported])
        sizes.append(store.path.stat().st_size)
        given = [{key: values.numpy() for key, values in feed.items()} for feed in feeds(stages)]
        runs = [run_graph(stage, store, [feed])[0] for stage, feed in zip(exported, given, strict=True)]
        outputs.append([next(iter(run.values())) for run in runs])
    assert graphs[0] == graphs[1] and sizes[0] == sizes[1]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)


class Shared(torch.nn.Module):
    """One weight read by a Linear (transposed) and by a convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = torch.nn.Linear(64, 64), torch.nn.Conv2d(64, 64, 1)

    def forward(self, x):
        return self.linear(x) + self.conv(x[:, :, None, None])[:, :, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bfloat16_is_stored_as_it_is_too(tmp_path, dtype):
    torch.manual_seed(0)
    module = compute_in_float32(Shared().to(dtype)).requires_grad_(False)
    x = torch.randn(2, 64)
    case = export(tmp_path, module, {"x": x})
    large = [ref for ref in case.stage.weights.values() if len(ref.shape) > 1]
    assert len(large) == 2 and {ref.length for ref in large} == {2 * 64 * 64}, "two bytes a number"
    assert not [node for node in case.stage.graph.node if node.op_type in ("Cast", "Transpose")]
    np.testing.assert_allclose(case.run(case.stage), module(x).numpy(), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_only_read_transposed(tmp_path):
    """Of a Linear without bias over a sequence: its Cast was left without its weight, and T5 did not export."""
    torch.manual_seed(0)
    module = compute_in_float32(torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False)).half()).requires_grad_(False)
    x = torch.randn(2, 5, 64)
    case = export(tmp_path, module, {"x": x})
    assert not [node for node in case.stage.graph.node if node.op_type in ("Cast", "Transpose")]
    np.testing.assert_allclose(case.run(case.stage), module(x).numpy(), rtol=1e-5, atol=1e-5)


def test_what_a_folder_stores(tiny_student, tmp_path):
    assert stored_dtype(tiny_student / "unet") == torch.float16
    for name, tensors, expected in (
        ("mixed", {"a": torch.zeros(1), "b": torch.zeros(1).half()}, torch.float32),
        ("ids", {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.zeros(1, dtype=torch.int64)}, torch.bfloat16),
        ("none", {"b": torch.zeros(1, dtype=torch.int64)}, torch.float32),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        assert stored_dtype(tmp_path / name) == expected


def test_a_variant_is_read_by_its_name(tmp_path):
    """Files such as diffusion_pytorch_model.fp16.safetensors; without the option, the refusal says which there are."""
    pipelines.build_pipeline().to(torch.float16).save_pretrained(tmp_path / "student", variant="fp16")
    pipelines.describe(tmp_path / "student")
    with pytest.raises(
        ArtifactError, match=r"does not load in diffusers: .*; it holds the variant fp16: add --variant"
    ):
        load_stages(tmp_path / "student")
    stages = load_stages(tmp_path / "student", variant="fp16", keep_half=True)
    assert torch.float16 in {values.dtype for values in stages.denoiser(SIZE).parameters()}


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (LCMScheduler(), r'is LCMScheduler, whose steps .*"sampler": \{"kind": "renoise", "boundary": 10\.0\}'),
        (EulerAncestralDiscreteScheduler(), r'is EulerAncestralDiscreteScheduler.*"kind": "ancestral"'),
        (PNDMScheduler(), r"does not tell which sampler the model was trained for \(the scheduler PNDMScheduler"),
        (DDIMScheduler(thresholding=True), "clips x0"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas is not supported"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_sampler_that_nobody_named_is_asked_for(tmp_path, scheduler, says):
    """They became DDIM without a word, 26-34 dB from what the pipeline itself draws."""
    scheduler.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    file = pipelines.describe(tmp_path) / "imagine_flash.json"
    by_hand = {key: value for key, value in json.loads(file.read_text()).items() if key != "sampler"}
    file.write_text(json.dumps(by_hand))
    with pytest.raises(ArtifactError, match=says) as raised:
        load_stages(tmp_path)
    assert "\n" not in str(raised.value)
    pipelines.describe(tmp_path, sampler={"kind": "deterministic"})
    with pytest.raises(ArtifactError, match="does not load in diffusers"):
        load_stages(tmp_path)  # it asks no more, and goes on to the weights, which are not there


PARTS = {  # of the tiny pipeline: its file, and a part of its names
    "text_encoder": ("model.safetensors", "layers.1."),
    "unet": ("diffusion_pytorch_model.safetensors", "mid_block."),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.conv_out."),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_network_that_is_not_whole_is_refused(tmp_path, part):
    """A text encoder was filled up with random numbers without a word; the others failed with a traceback, on the device meta."""
    pipelines.build_pipeline().save_pretrained(tmp_path)
    name, lost = PARTS[part]
    file = tmp_path / part / name
    tensors = load_file(file)
    kept = {key: values for key, values in tensors.items() if lost not in key}
    save_file(kept, file, {"format": "pt"})
    first, more = min(tensors.keys() - kept.keys()), len(tensors) - len(kept) - 1
    with pytest.raises(ArtifactError, match=rf"{part} lacks the weights {first} and {more} more; fetch") as raised:
        load_pipeline(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tiny_decoder_that_is_not_whole_is_refused(tmp_path):
    student = pipelines.build_student(tmp_path / "student")
    pipelines.build_vae("tiny", 16).save_pretrained(tmp_path / "tiny")
    file = tmp_path / "tiny" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    gone = next(iter(tensors))
    save_file({key: values for key, values in tensors.items() if key != gone}, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"tiny lacks the weights {gone}; fetch it again"):
        load_stages(student, tiny_decoder=tmp_path / "tiny")


def old_names(tensors):
    """As Stable Diffusion 1.5's CLIP was saved: with a level that transformers 5 took out, and the places as a tensor."""
    named = {f"text_model.{name}": values for name, values in tensors.items()}
    return named | {"text_model.embeddings.position_ids": torch.arange(pipelines.CONTEXT_LENGTH)[None]}


def embeddings_twice(tensors):
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


def embeddings_by_the_other_name(tensors):
    return {name.replace("shared", "encoder.embed_tokens"): values for name, values in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "write"),
    [("sd15", old_names), ("pixart", embeddings_twice), ("pixart", embeddings_by_the_other_name)],
    ids=lambda case: getattr(case, "__name__", case),
)
def test_names_that_the_libraries_read_are_not_missing(tmp_path, kind, write):
    pipeline = architectures.DRAWN[kind]()
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    save_file(write(load_file(file)), file, {"format": "pt"})
    loaded, expected = load_pipeline(tmp_path).text_encoder.state_dict(), pipeline.text_encoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in loaded.items())


def test_a_text_encoder_in_pieces_of_a_variant(tmp_path):
    """Beside networks that have none of the variant: each part's own is read."""
    pipeline = pipelines.build_pipeline()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    half = pipeline.text_encoder.half()
    half.save_pretrained(tmp_path / "text_encoder", variant="fp16", max_shard_size="20KB")
    loaded = load_pipeline(tmp_path, variant="fp16").text_encoder.state_dict()
    assert all(torch.equal(values, half.state_dict()[name].float()) for name, values in loaded.items())


def test_a_size_beyond_the_places_that_a_network_knows(tmp_path):
    """Of Stable Diffusion 3, whose table of places ends: it was a ValueError of diffusers."""
    stages = stages_of(architectures.build_sd3())
    side = 16 * 2 * stages.downscale  # places of 2x2 latents
    stages.check_size((side, side))
    inputs = torch.zeros(1, *stages.latent_shape((side, stages.multiple))), torch.zeros(1)
    with torch.inference_mode():
        conditions = stages.text_encoder(*stages.example_tokens(1).values())
        assert stages.denoiser(None)(*inputs, *conditions).shape == inputs[0].shape
    with pytest.raises(
        ArtifactError, match=f"a size must be at most {side}x{side} for this student, .*got 64x{2 * side}"
    ):
        stages.check_size((2 * side, 64))
