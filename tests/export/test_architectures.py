"""Every pipeline class: the denoiser is asked what diffusers' own pipeline asks, and its export draws the same images."""

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError, PlanError, ScheduleError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.export.ledger import LIMITS
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.pipelines.architectures import ARCHITECTURES, stages_of
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests import architectures, pipelines

PROMPT = "a fox on a pink background"


def asked(network: torch.nn.Module, run) -> dict[str, Any]:
    """The arguments of the network's last call in run(), by the names of its forward, without what is None or a switch."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(type(network).forward)

    def keep(module, args, kwargs):
        calls.append(dict(signature.bind(module, *args, **kwargs).arguments))

    hook = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            run()
    finally:
        hook.remove()
    found = {name: value for name, value in calls[-1].items() if name not in ("self", "return_dict")}
    for name, value in (found.pop("added_cond_kwargs", None) or {}).items():
        found[name] = value
    return {name: value for name, value in found.items() if value is not None and not isinstance(value, dict)}


BUILDERS = {
    **architectures.DRAWN,
    "pixart told its size": lambda: architectures.build_pixart(sample_size=128),
    "lcm": architectures.build_lcm,
    "lcm of sdxl": lambda: architectures.told_guidance(architectures.build_sdxl()),
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_network_is_asked_what_diffusers_asks(kind: str) -> None:
    pipeline = BUILDERS[kind]()
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    stages, size = stages_of(pipeline), (64, 96)
    settings: dict[str, Any] = (
        {"use_resolution_binning": False, "clean_caption": False} if kind.startswith(("pixart", "sana")) else {}
    )
    settings |= {"max_sequence_length": 256} if kind == "flux" else {}
    told = [torch.tensor([3.0])] if stages.is_told_guidance else []
    settings |= {"num_inference_steps": 2, "guidance_scale": 3.0 if told else 1.0}
    settings |= {"output_type": "latent", "height": 64, "width": 96}
    theirs = asked(network, lambda: pipeline(PROMPT, **settings))
    latents = theirs["hidden_states" if "hidden_states" in theirs else "sample"]
    timestep = torch.as_tensor(theirs["timestep"], dtype=torch.float32).reshape(-1)[:1]
    if kind in ("flux", "sana"):  # whose pipelines tell their networks a thousandth of the time
        timestep = timestep * 1000
    if kind == "flux":
        latents = pipeline._unpack_latents(latents, *size, 8)
    conditions = stages.text_encoder(*stages.encode_prompts([PROMPT]).values())
    ours = asked(network, lambda: stages.denoiser(size)(latents, timestep, *conditions, *told))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = torch.as_tensor(ours[name], dtype=torch.float32)
        assert torch.allclose(got, torch.as_tensor(expected, dtype=torch.float32).expand_as(got), atol=1e-6), name


def changed(kind: str, part: str, **config: Any) -> Any:
    """A pipeline with one component built anew, of another config."""
    pipeline = architectures.DRAWN[kind]()
    old = getattr(pipeline, part)
    values = {key: value for key, value in old.config.items() if key != "_use_default_values"}
    setattr(pipeline, part, type(old).from_config({**values, **config}))
    return pipeline


@pytest.mark.parametrize(
    ("kind", "part", "config", "message"),
    [
        ("sd15", "unet", {"class_embed_type": "timestep"}, "told more than its text (class_embed_type='timestep')"),
        ("sd15", "unet", {"num_class_embeds": 3}, "told more than its text (num_class_embeds=3)"),
        ("sd15", "unet", {"out_channels": 8}, "the unet gives 8 channels for 4, a variance perhaps"),
        ("sdxl", "unet", {"projection_class_embeddings_input_dim": 5 * 8 + 16}, "the unet is told 5 numbers beside"),
    ],
)
def test_a_network_that_is_told_something_else_is_refused_by_name(kind, part, config, message) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)) as raised:
        stages_of(changed(kind, part, **config))
    assert "\n" not in str(raised.value)


def test_a_pixart_that_says_itself_whether_it_is_told_its_size() -> None:
    """diffusers' pipeline looks at sample_size instead, and fails with this network."""
    stages = stages_of(changed("pixart", "transformer", use_additional_conditions=True))
    with torch.inference_mode():
        conditions = stages.text_encoder(*stages.encode_prompts([PROMPT]).values())
        x, t = torch.randn(1, 4, 8, 12), torch.tensor([999.0])
        assert not torch.equal(
            stages.denoiser((64, 96))(x, t, *conditions), stages.denoiser((96, 64))(x, t, *conditions)
        )


@pytest.mark.parametrize(
    ("kind", "heeded"),
    [
        ("sd15", ()),
        ("sdxl", ("latents_mean", "latents_std")),
        ("sd3", ("shift_factor",)),
        ("pixart", ()),
        ("flux", ("shift_factor",)),
    ],
)
def test_latents_are_unscaled_as_the_class_does(kind: str, heeded: tuple[str, ...]) -> None:
    """Of one vae, StableDiffusionPipeline ignores what StableDiffusionXLPipeline heeds."""
    config = {"latents_mean": [0.5, -1.0, 0.3, 0.1], "latents_std": [1.5, 0.7, 1.1, 2.0], "shift_factor": 0.4}
    pipeline = changed(kind, "vae", **config)
    stages, scale = stages_of(pipeline), pipeline.vae.config.scaling_factor
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    z = x * std / scale + mean if "latents_mean" in heeded else x / scale + (0.4 if "shift_factor" in heeded else 0.0)
    with torch.inference_mode():
        torch.testing.assert_close(stages.decoder.decode(x), pipeline.vae.decode(z).sample)
        image = stages.decoder(x)[0]
        encoded = pipeline.vae.encode(image.permute(0, 3, 1, 2) / 127.5 - 1.0).latent_dist.mode()
        back = stages.image_encoder(image) * (std if "latents_mean" in heeded else 1.0) / scale
        shift = mean if "latents_mean" in heeded else 0.4 if "shift_factor" in heeded else 0.0
        torch.testing.assert_close(back + shift, encoded)


EXPECTED = {
    "sdxl": "StableDiffusionXL",
    "sd3": "StableDiffusion3",
    "pixart": "PixArtAlpha",
    "flux": "Flux",
    "sana": "SanaSprint",
}
KINDS = [pytest.param(kind, marks=[pytest.mark.weekly] * (kind in ("flux", "sana"))) for kind in EXPECTED]


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    student = architectures.build_student(request.param, folder / "student")
    prompts, own_encoder = (PROMPT, "a cat to the left of a dog"), request.param == "sana"
    options = ExportOptions(
        steps=(1, 2), batch=(1, 2), sizes=((64, 96),), prompts=prompts, image_encoder=own_encoder
    )  # the others' is the vae that the smallest student has, too
    return request.param, student, export_student(student, folder / "artifact", options=options), folder / "artifact"


@pytest.mark.slow
def test_every_class_passes_the_gate(exported) -> None:
    kind, _, manifest, _ = exported
    assert manifest.pipeline == f"{EXPECTED[kind]}Pipeline"
    assert max(figures["m"] for name, figures in manifest.parity.items() if name == "denoiser") <= 1e-4
    assert all(figures["images"] <= 1 for figures in manifest.parity.values() if "images" in figures)
    assert manifest.graphs["denoiser"].nodes["Attention"] > 0
    conditions = [spec.name for spec in manifest.graphs["text_encoder"].outputs]
    told = ["guidance"] if kind == "sana" else []
    assert [spec.name for spec in manifest.graphs["denoiser"].inputs] == ["latents", "timestep", *conditions, *told]


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "fp16") for kind in ("sdxl", "sd3", "pixart", "flux", "sana")), ("sana", "bf16")]
)
def test_half_precision_passes_the_gate_of_every_class(kind: str, precision: Any, tmp_path) -> None:
    student = architectures.build_student(kind, tmp_path / "student")
    options = ExportOptions(
        precision=precision, sizes=((64, 64),), steps=(1,), batch=(1, 1), forms="stages", image_encoder=False
    )  # FLUX's own size is 1024x1024, whatever its width
    manifest = export_student(student, tmp_path / "artifact", options=options)
    assert manifest.precision == precision and manifest.parity["stages_1"]["psnr"] >= LIMITS[precision].psnr
    assert any("time" in island for island in manifest.graphs["denoiser"].islands), "angles need float32"


@pytest.mark.slow
def test_the_runtime_draws_what_torch_draws(exported) -> None:
    """From the prompt on: tokenizers, conditions, every step, by both routes."""
    _, student, manifest, artifact = exported
    stages = load_stages(student)
    engines = [Engine.load(artifact), Engine.load(artifact, route="sampler")]
    table, told = manifest.update_tables()[2], manifest.schedule.network_time
    from imagine_flash.core.noise import initial_noise
    from imagine_flash.core.update import sample

    with torch.inference_mode():
        text = stages.text_encoder(*stages.encode_prompts([PROMPT]).values())
        x_T, network = torch.from_numpy(initial_noise(5, 1, stages.latent_shape((64, 96)))), stages.denoiser((64, 96))
        text += (torch.ones(1),) if manifest.guidance.embedded else ()
        x = sample(lambda x, t: network(x, torch.tensor([float(told(t))]), *text), x_T, table)
        expected = stages.decoder(x)[0].numpy().astype(int)
    for engine in engines:
        got = engine.generate(GenerateRequest(prompt=PROMPT, steps=2, seed=5)).images
        assert got.shape == (1, 64, 96, 3) and np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_a_lora_student_is_fused_into_its_base(tmp_path) -> None:
    """The student's answers differ from its base's and equal those of diffusers with the adapter loaded."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base, student = tmp_path / "base", tmp_path / "student"
    pipeline = pipelines.build_pipeline()
    pipeline.save_pretrained(base, safe_serialization=True)
    plain = stages_of(pipelines.build_pipeline())
    torch.manual_seed(4)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    student.mkdir()
    adapter: Any = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(student, unet_lora_layers=adapter)
    pipelines.describe(student, base="../base")
    fused = load_stages(student)
    latents, t, text = torch.randn(1, 4, 8, 8), torch.tensor([999.0]), torch.randn(1, 16, 32)
    with torch.inference_mode():
        expected = pipeline.unet(latents, t, text, return_dict=False)[0]
        got = fused.denoiser((64, 64))(latents, t, text)
        before = plain.denoiser((64, 64))(latents, t, text)
    assert torch.allclose(got, expected, atol=1e-5) and not torch.allclose(got, before, atol=1e-3)
    (student / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"pytorch_lora_weights\.safetensors is missing, so it is no LoRA of"):
        load_stages(student)


@pytest.mark.slow
@pytest.mark.weekly  # tests/test_first_run.py exports a model with a tiny decoder too
def test_a_tiny_decoder_takes_the_place_of_the_students(tiny_student, tiny_artifact, tmp_path) -> None:
    pipelines.build_vae("tiny", 16).save_pretrained(tmp_path / "tiny")
    options = ExportOptions(tiny_decoder=tmp_path / "tiny", steps=(1,), batch=(1, 1))
    manifest = export_student(tiny_student, tmp_path / "out", options=options)
    assert manifest.scaling_factor == 1.0
    whole, small = Engine.load(tiny_artifact), Engine.load(tmp_path / "out")
    request = GenerateRequest(prompt=PROMPT, steps=1, seed=1)
    assert not np.array_equal(whole.generate(request).images, small.generate(request).images)
    pipelines.build_vae("tiny", 16, 8).save_pretrained(tmp_path / "eight")
    with pytest.raises(ArtifactError, match="takes 4 channels and the vae has 8"):
        load_stages(tiny_student, tiny_decoder=tmp_path / "eight")
    with pytest.raises(ArtifactError, match="is no AutoencoderTiny"):
        load_stages(tiny_student, tiny_decoder=tmp_path)


def broken(tmp_path, change) -> Any:
    student = pipelines.build_student(tmp_path / "student")
    change(student)
    return student


def edit(path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


BAD_STUDENTS = {
    "another class": (
        lambda s: edit(s / "model_index.json", '"StableDiffusionPipeline"', '"StableDiffusionPipelin"'),
        ArtifactError,
        r"cannot read a StableDiffusionPipelin; did you mean 'StableDiffusionPipeline'\?; known classes: .*(SD|Stable)",
    ),
    "no closed form": (
        lambda s: edit(s / "scheduler/scheduler_config.json", '"scaled_linear"', '"sigmoid"'),
        ScheduleError,
        "beta_schedule must be one of",
    ),
    "truncated weights": (
        lambda s: (s / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\x10" * 100),
        ArtifactError,
        "does not load in diffusers",
    ),
    "a damaged weight": (
        lambda s: (s / "vae/diffusion_pytorch_model.safetensors").unlink(),
        ArtifactError,
        "does not load in diffusers",
    ),
    "no scheduler": (
        lambda s: (s / "scheduler/scheduler_config.json").unlink(),
        ArtifactError,
        r"cannot read .*scheduler_config\.json: No such file",
    ),
}


@pytest.mark.parametrize("name", BAD_STUDENTS)
def test_a_bad_student_is_one_line(name: str, tmp_path) -> None:
    change, kind, message = BAD_STUDENTS[name]
    student = broken(tmp_path, change)
    with pytest.raises(kind, match=message) as raised:
        export_student(student, tmp_path / "out")
    assert "\n" not in str(raised.value) and {path.name for path in tmp_path.iterdir()} == {"student"}


BAD_OPTIONS = {
    "size": (
        {"sizes": ((60, 64),)},
        ArtifactError,
        "a size must be a multiple of 8 for this student, got 64x60; try 64x64",
    ),
    "plan": ({"steps": (4,)}, PlanError, "steps must be 1, 2 or 3, got 4"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_what_a_student_cannot_do_is_one_line(name: str, tiny_student, tmp_path) -> None:
    values, kind, message = BAD_OPTIONS[name]
    with pytest.raises(kind, match=message):
        export_student(tiny_student, tmp_path / "out", options=ExportOptions(**values))
    assert not list(tmp_path.iterdir())


def test_a_hub_id_that_cannot_be_fetched(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="owner/nothing is no folder here and could not be fetched"):
        export_student("owner/nothing", tmp_path / "out")


def test_the_known_classes_are_diffusers_own(tiny_artifact) -> None:
    import diffusers

    assert all(hasattr(diffusers, name) for name in ARCHITECTURES)
    assert set(read_artifact_manifest(tiny_artifact).graphs) >= {"denoiser", "sampler_3_from_embeddings"}
