"""What a student begins with, and what of its teacher its folder holds: the weights as they are stored, rounded once."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from imagine_flash.distill import student
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_model, load_teacher
from imagine_flash.distill.task import DistillTask
from imagine_flash.tests.architectures import DRAWN
from imagine_flash.tests.pipelines import CAPTIONS

FIT: dict[str, Any] = {"steps": 1, "batch": 2, "preview_every": 0, "mixed_precision": "bf16"}
STILL = {**FIT, "learning_rate": 1e-12, "weight_decay": 0}


def test_a_teacher_in_bfloat16_rounds_nothing_of_its_student(teacher: Path, tmp_path: Path) -> None:
    """The student began with weights of eight bits, and its text encoder and decoder were saved so."""
    recipe = distill_recipe({"teacher_dtype": "bfloat16", "teacher_steps": 1, "fit": STILL})
    student.distill(teacher, tmp_path / "student", recipe, prompts=list(CAPTIONS))
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        saved, stored = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "student", teacher))
        assert all(torch.equal(value, stored[key].half()) for key, value in saved.items()) and len(saved) == len(stored)


@pytest.mark.parametrize(
    "kind", ["sd15", "pixart", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "sd3"))]
)
def test_a_network_is_read_as_stored_and_the_teachers_rounded(kind: str, tmp_path: Path) -> None:
    DRAWN[kind]().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    stored, rounded = (load_model(tmp_path / "teacher", kind) for kind in (torch.float32, torch.bfloat16))
    recipe = distill_recipe({"teacher_dtype": "bfloat16", "fit": FIT})
    task = DistillTask(recipe, load_teacher(tmp_path / "teacher", recipe), ["a cat"], "")
    for network, expected in ((task.student.network, stored.network), (task.teacher.network, rounded.network)):
        tensors = dict([*network.named_parameters(), *network.named_buffers()])
        for name, value in [*expected.named_parameters(), *expected.named_buffers()]:
            assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name
    assert task.teacher.pipeline.vae.dtype == torch.bfloat16


def test_of_the_student_to_begin_with_only_the_network_stays(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its pipeline was kept on the GPU to the end."""
    encoders = []

    def load(folder: Path) -> Any:
        model = load_model(folder)
        encoders.append(weakref.ref(model.pipeline.text_encoder))
        return model

    monkeypatch.setattr(student, "load_model", load)
    network, _ = student._begun(teacher, None, load_model(teacher).network)
    gc.collect()
    assert isinstance(network, torch.nn.Module) and [each() for each in encoders] == [None]


def test_whole_matrices_of_attention_are_for_a_cpu_alone(teacher: Path) -> None:
    """Every bf16 run computed them, on GPUs too; the fused attention, slow on a CPU only, never keeps one."""
    recipe = distill_recipe({"fit": FIT})
    for device, kind in (("cpu", "AttnProcessor"), ("cuda", "AttnProcessor2_0")):
        task = DistillTask(recipe, load_teacher(teacher, recipe), ["a cat"], "", device=device)
        for model in (task.student, task.teacher):
            assert {type(each).__name__ for each in model.network.attn_processors.values()} == {kind}
