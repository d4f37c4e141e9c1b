"""Adapters: teacher and student are one copy, the folder is what diffusers and export read, checkpoints hold no base."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine_flash.core.errors import RecipeError
from imagine_flash.distill.discriminator import NetworkFeatures
from imagine_flash.distill.lora import WithoutAdapters, add_adapters, targets_in
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_model, model_of, noise_of
from imagine_flash.distill.recipe import LoraSettings
from imagine_flash.distill.student import distill
from imagine_flash.tests.architectures import BUILDERS
from imagine_flash.tests.pipelines import CAPTIONS

PROMPTS: list[str] = list(CAPTIONS)
FIT = {"steps": 2, "batch": 2, "schedule": "constant", "warmup": 0, "learning_rate": 1e-2, "preview_every": 0}


def recipe_of(**changes: Any) -> Any:
    values = {"loss_weight": "truncated_snr", "teacher_steps": 2, "lora": {"rank": 4}, "fit": FIT}
    return distill_recipe({**values, **changes})


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_a_lora_student_loads_in_diffusers_and_here(kind: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    teacher, out = tmp_path / "teacher", tmp_path / "student"
    BUILDERS[kind]().save_pretrained(teacher, safe_serialization=True)
    distill(teacher, out, recipe_of(gradient_checkpointing=True, lora={"rank": 4, "alpha": 8.0}), prompts=PROMPTS)
    assert {path.name for path in out.iterdir()} == {"pytorch_lora_weights.safetensors", "imagine_flash.json"}
    checkpoint = tmp_path / "student.run" / "checkpoints" / "student.safetensors"
    weights = sum(p.numel() for p in load_model(teacher).network.parameters())
    assert checkpoint.stat().st_size < 4 * 4 * weights  # adapters, EMA and two moments, but no base

    student, base = load_model(out), load_model(teacher)
    x, text = noise_of([3, 4], student.latent_shape), student.embed(["a cat", "a dog"])
    with torch.no_grad():
        ours, before = student.denoiser(x, 499, text), base.denoiser(x, 499, text)
    assert (ours - before).abs().max() > 1e-3
    pipeline: Any = DiffusionPipeline.from_pretrained(str(teacher), dtype=torch.float32)
    pipeline.load_lora_weights(str(out))
    with torch.no_grad():
        theirs = model_of(pipeline).denoiser(x, 499, text)
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=1e-3)


def test_without_adapters_it_is_the_teacher() -> None:
    """Also where a gradient runs through it with checkpointing, and in a network that trains."""
    model = model_of(BUILDERS["sd15"]())
    original = copy.deepcopy(model.network)
    expected = model.with_network(original).denoiser
    student = add_adapters(model, LoraSettings(rank=4))
    for name, p in student.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    student.network.enable_gradient_checkpointing()
    student.network.train()
    teacher = student.denoiser.with_network(WithoutAdapters(student.denoiser.network, student.network))
    x, text = noise_of([1, 2], model.latent_shape), model.embed(["a cat", "a dog"])
    gradients = []
    for denoiser in (teacher, expected):
        own = x.clone().requires_grad_(True)
        features = NetworkFeatures(denoiser)(own, 300, text)
        gradients.append(torch.autograd.grad(sum(f.square().mean() for f in features), own)[0])  # type: ignore[arg-type]
    torch.testing.assert_close(gradients[0], gradients[1])
    with torch.no_grad():
        torch.testing.assert_close(teacher(x, 300, text), expected(x, 300, text))
        assert (student.denoiser(x, 300, text) - expected(x, 300, text)).abs().max() > 1e-3
    trained = [name for name, p in student.network.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_resumed_lora_is_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    teacher = tmp_path / "teacher"
    BUILDERS["sd15"]().save_pretrained(teacher, safe_serialization=True)
    distill(teacher, tmp_path / "whole", recipe_of(), prompts=PROMPTS)
    for steps in (1, 2):
        distill(teacher, tmp_path / "resumed", recipe_of(fit={**FIT, "steps": steps}), prompts=PROMPTS)
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "resumed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("dtype", "lora"), [("bfloat16", {"rank": 4}), ("bfloat16", None), ("float16", None)])
def test_the_teacher_may_be_in_half_precision(dtype: str, lora: dict[str, int] | None, tmp_path: Path) -> None:
    """What trains is float32, adapters or a whole copy; the student's folder is as ever. Adapters in float16 are refused."""
    BUILDERS["sd15"]().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    distill(tmp_path / "teacher", tmp_path / "out", recipe_of(teacher_dtype=dtype, lora=lora), prompts=PROMPTS)
    assert all(p.isfinite().all() for p in load_model(tmp_path / "out").network.parameters())


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("sd15", {"lora": {"targets": ["to_x"]}}, "the network has no 'to_x'; its layers end with"),
        ("pixart", {}, "PixArtAlphaPipeline reads no LoRA"),
        ("sd15", {"method": "dmd2", "gan_weight": 0}, "keeps a second network"),
    ],
)
def test_what_cannot_be(kind: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    BUILDERS[kind]().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    values = {"lora": {"rank": 4}, "fit": FIT, **changes}
    with pytest.raises(RecipeError, match=says):
        distill(tmp_path / "teacher", tmp_path / "out", distill_recipe(values), prompts=PROMPTS)
    assert not (tmp_path / "out").exists()


def test_targets() -> None:
    network = model_of(BUILDERS["sd15"]()).network
    attention, everything = targets_in(network, "attention"), targets_in(network, "all")
    assert set(attention) < set(everything) and all(".attn" in name for name in attention)
    assert any(name.endswith("conv1") for name in everything)


def test_kept_embeddings_are_those_of_the_prompts(tmp_path: Path) -> None:
    """In half precision, encoded once; other prompts are encoded again."""
    from imagine_flash.distill.data.embeddings import Embeddings

    model, path, rows = model_of(BUILDERS["sdxl"]()), tmp_path / "text.safetensors", torch.tensor([4, 0, 2])
    fresh, kept = Embeddings(model, PROMPTS), Embeddings(model, PROMPTS, path)
    for ours, theirs in zip(kept[rows], fresh[rows], strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=2e-3, rtol=2e-3)
    written = path.read_bytes()
    Embeddings(model, PROMPTS, path)
    assert path.read_bytes() == written
    assert len(Embeddings(model, PROMPTS[:2], path)) == 2 and path.read_bytes() != written


def test_a_distillation_with_kept_embeddings(tmp_path: Path) -> None:
    BUILDERS["pixart"]().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    recipe = distill_recipe({"cache_text": True, "loss_weight": "v", "fit": {**FIT, "preview_every": 2}})
    distill(tmp_path / "teacher", tmp_path / "student", recipe, prompts=PROMPTS)
    assert (tmp_path / "student.run" / "text.safetensors").is_file()
    assert load_model(tmp_path / "student").stages.pipeline == "PixArtAlphaPipeline"
