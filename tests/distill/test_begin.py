"""What a student begins with, and what of its teacher its folder holds: the weights as they are stored, rounded once."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from imagine_flash.core.errors import ArtifactError
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.distill import student
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_model, load_teacher
from imagine_flash.distill.task import DistillTask
from imagine_flash.tests.architectures import DRAWN
from imagine_flash.tests.pipelines import CAPTIONS, build_pipeline

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
    network, _ = student._begun(teacher, None, load_model(teacher))
    gc.collect()
    assert isinstance(network, torch.nn.Module) and [each() for each in encoders] == [None]


def with_scheduler(teacher: Path, out: Path, **changes: Any) -> Path:
    """A copy of the teacher with other keys in its scheduler's config."""
    shutil.copytree(teacher, out)
    config = out / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prediction_type": "epsilon"}, r"other predicts epsilon, and the teacher v_prediction; begin with"),
        ({"beta_end": 0.02}, "other was trained on another noise schedule than the teacher"),
        ({"rescale_betas_zero_snr": True}, "other was trained on another noise schedule"),
        ({"num_train_timesteps": 500}, "other was trained on another noise schedule"),
        ({}, r"other has another network than the teacher, .*weight of \(\d+, 48\) and \(\d+, 32\)"),
    ],
)
def test_a_network_of_another_kind_is_no_beginning(
    change: dict[str, Any], says: str, teacher: Path, tmp_path: Path
) -> None:
    """A student of v began for an epsilon teacher without a word; another width was a RuntimeError in the first update."""
    model, other = load_model(teacher), tmp_path / "other"
    if change:
        with_scheduler(teacher, other, **change)
    else:
        build_pipeline(hidden=48).save_pretrained(other, safe_serialization=True)
    for start, start_teacher in ((other, None), (teacher, other)):
        with pytest.raises(ArtifactError, match=says):
            student._begun(start, start_teacher, model)


def test_it_is_refused_before_anything_is_encoded(teacher: Path, tmp_path: Path) -> None:
    recipe = distill_recipe({"cache_text": True, "fit": FIT})
    other = with_scheduler(teacher, tmp_path / "other", prediction_type="epsilon")
    with pytest.raises(ArtifactError, match="predicts epsilon"):
        student.distill(teacher, tmp_path / "student", recipe, prompts=list(CAPTIONS), start=other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_another_sampler_or_a_lora_is_a_beginning(teacher: Path, tmp_path: Path) -> None:
    """A student that re-noises by plans of its own; one that is adapters of the same network, fused; a flow of another shift."""
    model, lcm = load_model(teacher), {"_class_name": "LCMScheduler", "original_inference_steps": 4}
    network, _ = student._begun(with_scheduler(teacher, tmp_path / "lcm", **lcm), teacher, model)
    assert network.state_dict().keys() == model.network.state_dict().keys()
    recipe = distill_recipe({"lora": {"rank": 2}, "teacher_steps": 1, "fit": {**FIT, "warmup": 0}})
    student.distill(teacher, tmp_path / "lora", recipe, prompts=list(CAPTIONS))
    network, _ = student._begun(tmp_path / "lora", None, model)
    assert network.state_dict().keys() == model.network.state_dict().keys()
    flows = [
        NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift})
        for shift in (1.0, 3.0)
    ]
    assert student._same_noise(*flows)
    assert not student._same_noise(flows[0], model.denoiser.schedule)


def test_whole_matrices_of_attention_are_for_a_cpu_alone(teacher: Path) -> None:
    """Every bf16 run computed them, on GPUs too; the fused attention, slow on a CPU only, never keeps one."""
    recipe = distill_recipe({"fit": FIT})
    for device, kind in (("cpu", "AttnProcessor"), ("cuda", "AttnProcessor2_0")):
        task = DistillTask(recipe, load_teacher(teacher, recipe), ["a cat"], "", device=device)
        for model in (task.student, task.teacher):
            assert {type(each).__name__ for each in model.network.attn_processors.values()} == {kind}
