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
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.pipelines.loading import load_student_pipeline
from imagine_flash.tests import architectures, pipelines
from imagine_flash.tests.hub import publish
from imagine_flash.tests.loras import ATTENTION, write_lora

RANK, ALPHA = 4, 2
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
