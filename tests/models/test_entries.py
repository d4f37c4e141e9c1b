"""Entries of the catalogue that are a LoRA or a network, on the base that the catalogue names or on a folder of one's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from imagine_flash.core.errors import ArtifactError
from imagine_flash.folders.reading import read_student_manifest
from imagine_flash.models.links import link_network
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.pipelines.loading import load_student_pipeline
from imagine_flash.tests import architectures, pipelines
from imagine_flash.tests.hub import publish
from imagine_flash.tests.loras import ATTENTION, write_lora

RANK, ALPHA = 4, 2
XL = "stabilityai/stable-diffusion-xl-base-1.0"
LIGHTNING = ("1step_unet_x0", "4step_unet", "4step_lora", "8step_unet")  # of the repository's files
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A Stable Diffusion of one's own."""
    pipeline = pipelines.build_pipeline()
    pipeline.scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    pipeline.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def query(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first weight that the LoRAs here change."""
    return next(values for name, values in weights.items() if name.endswith("attn1.to_q.weight"))


def test_a_lora_of_pefts_is_as_strong_as_its_config_says(hub: Path, tmp_path: Path) -> None:
    """Only its weights were linked: alpha was the rank, and flash-pixart 8 times too strong."""
    pipeline = architectures.build_pixart()
    pipeline.save_pretrained(tmp_path / "base")
    publish(hub, "PixArt-alpha/PixArt-XL-2-1024-MS", tmp_path / "base")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"], init_lora_weights=False)
    network: Any = get_peft_model(pipeline.transformer, config)
    network.save_pretrained(tmp_path / "flash")
    publish(hub, "jasperai/flash-pixart", tmp_path / "flash")
    expected = query(network.merge_and_unload().state_dict())
    file = tmp_path / "flash" / "adapter_model.safetensors"
    assert (student_of(file, ModelOptions(entry="flash-pixart")) / "adapter_config.json").is_file()
    student = student_of("flash-pixart")
    torch.testing.assert_close(query(load_student_pipeline(student).transformer.state_dict()), expected)
    (tmp_path / "flash" / "adapter_config.json").unlink()
    student = student_of(file, ModelOptions(entry="flash-pixart"))
    with pytest.raises(ArtifactError, match=r"does not say how strong it is: peft keeps that in adapter_config\.json"):
        load_student_pipeline(student)


def test_a_lora_is_put_on_a_folder_of_ones_own(hub: Path, own: Path, tmp_path: Path) -> None:
    """It was left out, and the folder drawn in four steps that it was never trained for."""
    write_lora(tmp_path / "lora", pipelines.build_pipeline(), {"unet": ATTENTION})
    publish(hub, "latent-consistency/lcm-lora-sdv1-5", tmp_path / "lora")
    student = student_of(own, ModelOptions(entry="lcm-lora-sdv1-5"))
    manifest = read_student_manifest(student)
    assert manifest.base == "pipeline" and manifest.plans[4] == [999, 759, 499, 259]
    assert manifest.sources["weights"] == str(own)
    assert manifest.sources["lora"].startswith("latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors, ")
    factors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    name = next(name for name in factors if name.endswith("attn1.to_q.lora_A.weight"))
    a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
    before = query(load_file(own / "unet" / "diffusion_pytorch_model.safetensors"))
    torch.testing.assert_close(query(load_student_pipeline(student).unet.state_dict()), before + 2 * b @ a)


def test_a_folder_read_as_a_network_keeps_its_own(own: Path) -> None:
    """Since what is shared as such folders was trained further; it is said."""
    manifest = read_student_manifest(student_of(own, ModelOptions(entry="sdxl-lightning-4step")))
    assert manifest.base is None and manifest.plans == {4: [999, 749, 499, 249]}
    assert manifest.sources["network"] == "the weights' own folder, in place of the catalogue's"


def test_a_folder_that_is_no_pipeline_is_not_left_out(hub: Path, own: Path, tmp_path: Path) -> None:
    """The hub's model was drawn with instead."""
    publish(hub, "stabilityai/sd-turbo", own)
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match="other is no diffusers pipeline"):
        student_of(tmp_path / "other", ModelOptions(entry="sd-turbo"))


@pytest.mark.parametrize(
    ("entry", "linked", "file"),
    [
        ("sdxl-lightning-4step", "unet/diffusion_pytorch_model.safetensors", "sdxl_lightning_4step_unet.safetensors"),
        ("sdxl-lightning-8step", "unet/diffusion_pytorch_model.safetensors", "sdxl_lightning_8step_unet.safetensors"),
        ("sdxl-lightning-4step-lora", "pytorch_lora_weights.safetensors", "sdxl_lightning_4step_lora.safetensors"),
    ],
)
def test_of_a_copy_of_the_repository_the_entrys_file_is_taken(
    hub: Path, own: Path, tmp_path: Path, entry: str, linked: str, file: str
) -> None:
    """It was the first by name, for every entry: the weights of one step, whatever was asked for."""
    publish(hub, XL, own)
    copy = tmp_path / "SDXL-Lightning"
    copy.mkdir()
    for name in LIGHTNING:
        (copy / f"sdxl_lightning_{name}.safetensors").touch()
    student = student_of(copy, ModelOptions(entry=entry))
    assert (student / linked).resolve() == (copy / file).resolve()
    (copy / file).unlink()
    with pytest.raises(ArtifactError, match=r"Lightning holds sdxl_.*, sdxl_.*; give the path of one") as caught:
        student_of(copy, ModelOptions(entry=entry))
    assert "\n" not in str(caught.value)


def test_a_network_in_pieces_is_whole(hub: Path, own: Path, tmp_path: Path) -> None:
    """diffusers saves XL's full UNet so: all but its first piece were lost."""
    publish(hub, XL, own)
    unet = pipelines.build_pipeline().unet
    for values in unet.parameters():
        values.data += 1.0
    unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    student = student_of(tmp_path / "unet", ModelOptions(entry="sdxl-lightning-4step"))
    loaded, expected = load_student_pipeline(student).unet.state_dict(), unet.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in loaded.items())


INDEX = '{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'


@pytest.mark.parametrize(
    ("files", "given", "says"),
    [
        (
            ["model-1-of-2.safetensors"],
            "",
            r"holds model-1-of-2\.safetensors, one piece of several, and no index of all",
        ),
        (
            ["model-1-of-2.safetensors"],
            "model-1-of-2.safetensors",
            "is one piece of several; give the path of its folder",
        ),
        (
            ["model-1-of-2.safetensors", "model.safetensors.index.json"],
            "",
            r"lacks model-2-of-2\.safetensors, which model\.safetensors\.index\.json lists; put it there",
        ),
        (["a.safetensors", "b.safetensors"], "", r"holds a\.safetensors, b\.safetensors; give the path of one"),
    ],
)
def test_a_piece_is_no_network(tmp_path: Path, files: list[str], given: str, says: str) -> None:
    for name in files:
        (tmp_path / name).write_text(INDEX)
    with pytest.raises(ArtifactError, match=says) as caught:
        link_network(tmp_path / given, tmp_path / "made")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()
