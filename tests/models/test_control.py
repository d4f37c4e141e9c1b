"""ControlNets and T2I-adapters as parts of a model: which fit which, by their configs, and what is refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.folders.reading import read_student_manifest
from imagine_flash.models.control import ADAPTER, CONTROLNET, check_control, feature_maps
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests import architectures, control, pipelines

SD15: dict[str, Any] = {  # what matters of the real configs
    "in_channels": 4,
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
}
SDXL: dict[str, Any] = {
    "in_channels": 4,
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "addition_embed_type": "text_time",
    "projection_class_embeddings_input_dim": 2816,
}
FULL = {"channels": [320, 640, 1280, 1280], "adapter_type": "full_adapter", "downscale_factor": 8}
LIGHT = {"channels": [320, 640, 1280], "adapter_type": "light_adapter", "downscale_factor": 8}
XL = {"channels": [320, 640, 1280, 1280], "adapter_type": "full_adapter_xl", "downscale_factor": 16}
GREY = FULL | {"in_channels": 1}


@pytest.mark.parametrize(
    ("kind", "config", "unet"),
    [
        (CONTROLNET, SD15, SD15),
        (CONTROLNET, SDXL, SDXL),
        (ADAPTER, FULL, SD15),
        (ADAPTER, LIGHT, SD15),
        (ADAPTER, GREY, SD15),
        (ADAPTER, XL, SDXL),
    ],
)
def test_the_published_configs_fit_their_base_and_no_other(kind: str, config: Any, unet: Any) -> None:
    check_control(kind, config, unet)
    with pytest.raises(ArtifactError, match="was made for another base"):
        check_control(kind, config, SDXL if unet is SD15 else SD15)


@pytest.mark.parametrize("config", [FULL, LIGHT, XL])
def test_feature_maps_are_those_that_diffusers_gives(config: dict[str, Any]) -> None:
    import torch

    small = config | {"channels": [each // 40 for each in config["channels"]], "num_res_blocks": 1}
    with torch.inference_mode():
        given = diffusers.T2IAdapter(**small)(torch.zeros(1, 3, 128, 128))
    assert [(each.shape[1], 128 // each.shape[2]) for each in given] == feature_maps(small)


@pytest.mark.parametrize(
    ("kind", "changed", "says"),
    [
        (CONTROLNET, {"conditioning_channels": 6}, "reads pictures of 6 channels; only those of 3"),
        (CONTROLNET, {"global_pool_conditions": True}, "pools its picture"),
        (CONTROLNET, {"in_channels": 9}, "its in_channels is 9, the unet's 4"),
        (CONTROLNET, {"cross_attention_dim": 1024}, "its cross_attention_dim is 1024, the unet's 768"),
        (CONTROLNET, {"conditioning_embedding_out_channels": [16, 32]}, "one place in 2 pixels, the decoder has 8"),
        (ADAPTER, FULL | {"in_channels": 4}, "reads pictures of 4 channels; those of 3 or 1"),
        (ADAPTER, XL, "it gives 320/16, 640/16, 1280/32, 1280/32, the unet takes 320/8, 640/16, 1280/32"),
        (ADAPTER, FULL | {"channels": [320, 640]}, "was made for another base"),
        (
            "MultiControlNetModel",
            {},
            "one ControlNetModel or T2IAdapter reads the conditioning picture here, not a Multi",
        ),
    ],
)
def test_what_does_not_fit(kind: str, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtifactError, match=says) as caught:
        check_control(kind, (SD15 if kind == CONTROLNET else {}) | changed, SD15)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by name: the tiny pipeline, a ControlNet and an adapter for it, a ControlNet for the tiny XL."""
    folder, pipeline = tmp_path_factory.mktemp("made"), pipelines.build_pipeline()
    pipeline.save_pretrained(folder / "base")
    for kind, build in control.BUILDERS.items():
        control.saved(build(pipeline.unet), folder / kind)
    control.saved(control.build_controlnet(architectures.build_sdxl().unet), folder / "xl")
    pipelines.build_vae("tiny", 16).save_pretrained(folder / "taesd")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def with_control(base: Path, network: Path | str) -> Path:
    return student_of(base, ModelOptions(steps=(1,), guidance=1.0, controlnet=str(network)))


def test_the_students_folder_is_the_pipeline_that_diffusers_has_for_it(made: Path) -> None:
    """So diffusers loads it too; and what it saved itself is read, with another network in the place of its own."""
    student = with_control(made / "base", made / "controlnet")
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(student)
    assert isinstance(pipeline, diffusers.StableDiffusionControlNetPipeline)
    assert (student / "controlnet" / "diffusion_pytorch_model.safetensors").is_symlink()
    assert read_student_manifest(student).sources["control"] == f"{made / 'controlnet'}, a ControlNet"
    pipeline.save_pretrained(made / "saved")
    own = student_of(made / "saved", ModelOptions(steps=(1,)))
    assert load_stages(own).control == CONTROLNET
    other = with_control(student, made / "adapter")  # of what was described before
    assert json.loads((other / "model_index.json").read_text())["_class_name"] == "StableDiffusionAdapterPipeline"
    assert not (other / "controlnet").exists() and load_stages(other).control == ADAPTER
    assert with_control(made / "base", made / "controlnet") == student


def test_a_described_student_keeps_what_was_said_of_it(made: Path) -> None:
    first = student_of(made / "base", ModelOptions(steps=(4, 2), guidance=2.0))
    found = read_student_manifest(student_of(first, ModelOptions(controlnet=str(made / "adapter"))))
    known = read_student_manifest(first)
    assert (found.plans, found.guidance, found.default_steps) == (known.plans, known.guidance, known.default_steps)


BAD: dict[str, Any] = {
    "another base": (
        lambda made, tmp: made / "xl",
        r"its cross_attention_dim is 64, the unet's 32; give one of this model's",
    ),
    "another class": (
        lambda made, tmp: made / "taesd",
        "holds a AutoencoderTiny; a ControlNet is a folder of a ControlNet",
    ),
    "nothing there": (
        lambda made, tmp: tmp / "nowhere",
        "there is no ControlNet .*nowhere; give its folder or a hub id",
    ),
    "no config": (lambda made, tmp: tmp, r"cannot read .*config\.json"),
    "not fetched": (lambda made, tmp: "owner/nothing", "owner/nothing is no folder here and could not be fetched"),
    "a pickle": (lambda made, tmp: pickled(made / "controlnet", tmp), "only pickles, which are not read; convert them"),
}


def pickled(source: Path, tmp: Path) -> Path:
    shutil.copytree(source, tmp / "pickled")
    weights = tmp / "pickled" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    return tmp / "pickled"


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_network_for_it_is_one_line(name: str, made: Path, tmp_path: Path, cache: Path) -> None:
    network, says = BAD[name]
    with pytest.raises(ArtifactError, match=says) as caught:
        with_control(made / "base", network(made, tmp_path))
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_file()], "nothing half-written"


@pytest.mark.parametrize("kind", ["flux", "sd3", "pixart"])
def test_other_classes_are_refused_by_name(kind: str, made: Path, tmp_path: Path) -> None:
    pipeline = architectures.DRAWN[kind]()
    pipeline.save_pretrained(tmp_path / kind)
    wanted = f"a {type(pipeline).__name__} takes no ControlNet or T2I-adapter here; StableDiffusionPipeline, "
    with pytest.raises(ArtifactError, match=wanted):
        student_of(
            tmp_path / kind, ModelOptions(steps=(1,), sampler="deterministic", controlnet=str(made / "controlnet"))
        )


def test_an_artifact_has_its_networks(made: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(
        ArtifactError, match="was exported with its networks; export its student again with --controlnet"
    ):
        student_of(tmp_path, ModelOptions(controlnet=str(made / "controlnet")))


def test_an_index_that_says_zeros_for_no_prompt_is_heeded(tmp_path: Path) -> None:
    """XL's negative embeddings were those of the empty text, which diffusers' pipeline takes only where the index says so."""
    architectures.build_sdxl().save_pretrained(tmp_path / "xl")
    assert read_student_manifest(student_of(tmp_path / "xl", ModelOptions(steps=(1,)))).guidance.empty_is_zero
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    assert not read_student_manifest(student_of(tmp_path / "xl", ModelOptions(steps=(1,)))).guidance.empty_is_zero
