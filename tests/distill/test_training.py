"""Real trainings of real, tiny networks: the folders load in plain diffusers, and a kill costs nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from imagine_flash.core.errors import ArtifactError, RecipeError
from imagine_flash.distill.data import emoji
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_model
from imagine_flash.distill.processes import begin_training
from imagine_flash.distill.recipe import Fit, TeacherRecipe
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.student import add_learned, distill
from imagine_flash.distill.teacher import DenoisingLoss, TeacherTask, train_teacher
from imagine_flash.distill.untrained import build_model
from imagine_flash.folders.reading import read_student_manifest

TINY = {
    "scenes": 60,
    "autoencoder": {
        "width": 8,
        "latent_channels": 4,
        "encoder_scenes": 64,
        "fit": {"steps": 3, "batch": 2, "preview_every": 3},
    },
    "network": {"text_width": 32, "text_layers": 1, "channels": [16, 32]},
    "fit": {"steps": 3, "batch": 4, "preview_every": 3},
}
STUDENT = {"prompts": 40, "fit": {"steps": 4, "batch": 4, "preview_every": 4}}
pytestmark = pytest.mark.skipif(
    not any(Path(p).is_file() for p in emoji.FONT_PLACES), reason="no emoji font: install fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    train_teacher(TeacherRecipe.model_validate(TINY), out)
    return out


def test_a_teachers_validation_is_where_its_network_is(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the first one failed, its batch being on the host. `meta` stands for the GPU."""
    recipe = TeacherRecipe.model_validate(TINY)
    task, seen = TeacherTask(recipe, load_model(teacher), torch.zeros(60, 4, 8, 8)), list[set[str]]()

    def loss(**batch: torch.Tensor) -> torch.Tensor:
        seen.append({each.device.type for each in batch.values()})
        return torch.zeros(())

    monkeypatch.setattr(task, "module", loss)
    task.model.network.to("meta")
    assert task.validate() == {"loss": 0.0} and seen == [{"meta"}]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_a_teacher_loads_in_diffusers_and_draws(prediction_type: str, teacher: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    if prediction_type == "epsilon":
        teacher = tmp_path / "epsilon"
        train_teacher(TeacherRecipe.model_validate({**TINY, "prediction_type": "epsilon"}), teacher)
    pipeline: Any = DiffusionPipeline.from_pretrained(str(teacher), dtype=torch.float32)
    assert pipeline.scheduler.config.prediction_type == prediction_type
    picture = pipeline("a cat on pink", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    run = teacher.with_name(teacher.name + ".run")
    assert {p.name for p in (run / "previews").iterdir()} == {"autoencoder-000003.png", "teacher-000003.png"}


def test_our_sampler_is_the_pipelines(teacher: Path) -> None:
    """The deterministic update without noise correction draws what stock diffusers draws from the same noise."""
    from diffusers import DiffusionPipeline

    from imagine_flash.core.plan import StepPlan
    from imagine_flash.core.update import update_table
    from imagine_flash.distill.models import noise_of

    model = load_model(teacher)
    noise = noise_of([3], model.latent_shape)
    table = update_table(model.denoiser.schedule, StepPlan.trailing(4), "v_prediction", noise_correction=False)
    text, empty = model.embed(["a cat"]), model.embed([""])
    ours = model.sample(noise, text, table, uncond=empty, guidance=2.0)
    pipeline: Any = DiffusionPipeline.from_pretrained(str(teacher), dtype=torch.float32)
    theirs = pipeline("a cat", num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="latent").images
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_a_student_loads_in_diffusers_with_its_manifest(teacher: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    out = tmp_path / "student"
    distill(teacher, out, distill_recipe(STUDENT))
    manifest = read_student_manifest(out)
    assert not [path for path in out.rglob("*.json") if str(teacher.parent) in path.read_text()], (
        "a path of this machine"
    )
    assert dict(manifest.plans) == {1: [999], 2: [999, 499], 3: [999, 666, 333]}
    assert manifest.recipe["gamma"] == 0.75
    pipeline: Any = DiffusionPipeline.from_pretrained(str(out), dtype=torch.float32)
    assert pipeline("a cat", num_inference_steps=3, guidance_scale=1.0, output_type="np").images.shape == (1, 64, 64, 3)


def test_the_pipeline_draws_a_student_by_its_own_plan(teacher: Path, tmp_path: Path) -> None:
    """It happened that plain diffusers and docs/diffusers.md drew by trailing times what was trained on others."""
    from diffusers import DiffusionPipeline

    from imagine_flash.core.plan import StepPlan
    from imagine_flash.core.update import update_table
    from imagine_flash.distill.models import noise_of
    from imagine_flash.pipelines.scheduler import ImagineFlashScheduler

    plans = {"plans": {1: [999], 3: [999, 749, 499]}, "plan_weights": {1: 1.0, 3: 1.0}}
    distill(teacher, tmp_path / "student", distill_recipe({**STUDENT, **plans}))
    pipeline: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "student"), dtype=torch.float32)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    pipeline.scheduler = ImagineFlashScheduler.from_config(pipeline.scheduler.config)
    model = load_model(tmp_path / "student")
    noise = noise_of([5], model.latent_shape)
    table = update_table(model.denoiser.schedule, StepPlan((999, 749, 499)), "v_prediction", noise_correction=True)
    expected = model.sample(noise, model.embed(["a cat"]), table)
    got = pipeline("a cat", num_inference_steps=3, guidance_scale=1.0, latents=noise, output_type="latent").images
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    pipeline.scheduler.set_timesteps(2)  # no plan of the student's: trailing
    assert pipeline.scheduler.timesteps.tolist() == [999, 499]


_SCRIPT = """
import sys, json
from pathlib import Path
import torch
torch.set_num_threads(1)
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.student import add_learned, distill
distill(Path(sys.argv[1]), Path(sys.argv[2]), distill_recipe(json.loads(sys.argv[3])))
"""


def test_one_process_trains_in_two_precisions() -> None:
    """accelerate refuses a second one in a process: which test or notebook cell came first decided whether others failed."""
    for precision in ("bf16", "no", "bf16"):
        begin_training(precision)
        assert Accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision
    begin_training("no")


@pytest.mark.slow
def test_killed_and_resumed_gives_the_bit_identical_next_loss(teacher: Path, tmp_path: Path) -> None:
    """With the discriminator, its optimiser's group, Muon, EMA and every kind of target."""
    import json

    fit = {"steps": 20, "batch": 2, "preview_every": 0, "checkpoint_minutes": 1e-6}
    more = {"adversarial": {"ramp": 10}, "plain_share": 0.5, "loss_weight": "v", "guidance_at_0": 1.0}
    muon = {"optimizer": "muon", "mixed_precision": "bf16"}
    recipe = json.dumps({"prompts": 40, "fit": fit | muon, **more})

    def command(out: Path) -> list[str]:
        return [sys.executable, "-c", _SCRIPT, str(teacher), str(out), recipe]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed.run" / "logs" / "student.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 5):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists(), "the training ended before it could be killed"
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)

    def losses(path: Path) -> dict[str, str]:
        return {row.split(",")[0]: row.split(",")[1] for row in path.read_text().splitlines() if row.count(",") == 2}

    steps_of_killed = [row.split(",")[0] for row in log.read_text().splitlines()]
    assert steps_of_killed.count("0") == 1, "it started again instead of going on"
    whole = losses(tmp_path / "whole.run" / "logs" / "student.csv")
    assert len(whole) == 20 and losses(log) == whole
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.slow
def test_an_interrupted_training_keeps_its_updates_and_says_how_to_go_on(teacher: Path, tmp_path: Path) -> None:
    import re

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prompts: 40\nfit: {steps: 100000, batch: 2, preview_every: 0}\n")
    command = [
        sys.executable,
        "-m",
        "imagine_flash",
        "distill",
        str(teacher),
        str(tmp_path / "new" / "out"),
        "--recipe",
        str(recipe),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "new" / "out.run" / "logs" / "student.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not log.exists():
        time.sleep(0.05)
    assert log.exists()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    found = re.search(r"error: interrupted after (\d+) of 100000 updates; the same command goes on from there", said)
    assert found, said
    assert len(log.read_text().splitlines()) == int(found[1])
    assert (tmp_path / "new" / "out.run" / "checkpoints" / "student.safetensors").exists()


def test_a_student_begins_with_another(teacher: Path, tmp_path: Path) -> None:
    """One update at a rate of nothing leaves the weights that it began with."""
    first = tmp_path / "first"
    distill(teacher, first, distill_recipe(STUDENT))
    still = {**STUDENT, "fit": {"steps": 1, "batch": 2, "learning_rate": 1e-12, "weight_decay": 0, "preview_every": 0}}
    distill(teacher, tmp_path / "second", distill_recipe(still), start=first)
    ours, theirs = (load_model(tmp_path / name).network.state_dict() for name in ("first", "second"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not torch.equal(ours["conv_in.weight"], load_model(teacher).network.state_dict()["conv_in.weight"])


def test_a_student_takes_over_what_its_teacher_learned(teacher: Path, tmp_path: Path) -> None:
    """Of a teacher trained on, it begins with its own weights plus the difference of the teachers', and says what is missing."""
    first, later = tmp_path / "first", tmp_path / "later"
    distill(teacher, first, distill_recipe(STUDENT))
    fast = {"steps": 2, "batch": 2, "learning_rate": 1e-2, "warmup": 0, "ema_decay": 0}
    train_teacher(TeacherRecipe.model_validate({**TINY, "fit": fast}), later, start=teacher)
    still = {**STUDENT, "fit": {"steps": 1, "batch": 2, "learning_rate": 1e-12, "weight_decay": 0, "preview_every": 0}}
    distill(later, tmp_path / "second", distill_recipe(still), start=first, start_teacher=teacher)
    names = ("first", "second", "later")
    student, found, after = (load_model(tmp_path / name).network.state_dict() for name in names)
    before = load_model(teacher).network.state_dict()
    assert max(float((value - before[name]).abs().max()) for name, value in after.items()) > 1e-2, (
        "more than is allowed"
    )
    for name, value in found.items():
        torch.testing.assert_close(value, student[name] + after[name] - before[name], atol=1e-3, rtol=1e-2)
    with pytest.raises(RecipeError, match="give that by --start too"):
        distill(later, tmp_path / "third", distill_recipe(still), start_teacher=teacher)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match="must have one network"):
        add_learned(other, other, load_model(teacher).network)


def test_a_teacher_begins_with_another(teacher: Path, tmp_path: Path) -> None:
    """Its autoencoder is kept; tokens keep their embeddings though they stand elsewhere; new positions are new."""
    out = tmp_path / "second"
    change = {
        "network": {**TINY["network"], "context": 40},
        "fit": {"steps": 1, "batch": 2, "learning_rate": 1e-12, "weight_decay": 0},
    }
    figures = train_teacher(TeacherRecipe.model_validate({**TINY, **change}), out, start=teacher)
    before, after = load_model(teacher), load_model(out)
    assert figures["start"]["new"] == 0 and "autoencoder" not in figures
    for name in ("unet", "vae"):
        theirs = getattr(before.pipeline, name).state_dict()
        ours = getattr(after.pipeline, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert after.tokens(["a cat"])["input_ids"].shape == (1, 40)
    rows = [model.pipeline.tokenizer.get_vocab()["cat</w>"] for model in (before, after)]
    tables = [model.pipeline.text_encoder.get_input_embeddings().weight for model in (before, after)]
    assert torch.equal(tables[0][rows[0]], tables[1][rows[1]])


def test_a_teacher_learns_what_another_predicts(teacher: Path, tmp_path: Path) -> None:
    """Of its own type it knows it already, and the loss is 0; epsilon is alpha_t v + sigma_t x_t."""
    recipe = TeacherRecipe.model_validate({**TINY, "targets": "start", "prediction_type": "epsilon"})
    known, model = load_model(teacher), build_model(recipe, load_model(teacher).pipeline.vae)
    batch = TeacherTask(recipe, model, torch.randn(60, 4, 8, 8)).batch(0, Part())
    assert float(DenoisingLoss(known, load_model(teacher))(**batch)) == pytest.approx(0, abs=1e-9)
    alpha_t, sigma_t = model.denoiser.scales(batch["t"], batch["x0"])
    x_t, text = alpha_t * batch["x0"] + sigma_t * batch["eps"], known.embed_tokens({"input_ids": batch["ids"]})
    target = alpha_t * known.denoiser(x_t, batch["t"], text) + sigma_t * x_t
    eps = model.denoiser(x_t, batch["t"], model.embed_tokens({"input_ids": batch["ids"]}))
    torch.testing.assert_close(DenoisingLoss(model, known)(**batch), (eps - target).square().mean())

    fast = {"steps": 40, "batch": 8, "learning_rate": 3e-3, "warmup": 0, "ema_decay": 0.5, "preview_every": 0}
    train_teacher(recipe.model_copy(update={"fit": Fit.model_validate(fast)}), tmp_path / "epsilon", start=teacher)
    learned = [float(row.split(",")[1]) for row in (tmp_path / "epsilon.run/logs/teacher.csv").read_text().splitlines()]
    assert sum(learned[-5:]) < 0.6 * sum(learned[:5])
    assert load_model(tmp_path / "epsilon").denoiser.prediction_type == "epsilon"


@pytest.mark.parametrize("change", [{"seed": 1}, {"network": {**TINY["network"], "context": 40}}, {"beta_end": 0.01}])
def test_a_teacher_of_other_words_or_noise_gives_no_targets(change: dict, teacher: Path, tmp_path: Path) -> None:
    recipe = TeacherRecipe.model_validate({**TINY, "targets": "start", **change})
    with pytest.raises(RecipeError, match=r"needs the seed, context and betas of the recipe that made .*teacher"):
        train_teacher(recipe, tmp_path / "out", start=teacher)
    assert list(tmp_path.iterdir()) == []


def test_the_discriminator_needs_pictures(teacher: Path, tmp_path: Path) -> None:
    recipe = distill_recipe({**STUDENT, "adversarial": {}})
    with pytest.raises(RecipeError, match="needs pictures"):
        distill(teacher, tmp_path / "out", recipe, prompts=["a cat"])
    assert not (tmp_path / "out.run").exists()


def test_bad_teachers(teacher: Path, tmp_path: Path) -> None:
    recipe = distill_recipe(STUDENT)
    without = tmp_path / "without"
    without.mkdir()
    with pytest.raises(ArtifactError, match=r"model_index\.json"):
        distill(without, tmp_path / "out", recipe)
    (without / "model_index.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot read"):
        distill(without, tmp_path / "out", recipe)
    (without / "model_index.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot read a None; known classes: StableDiffusionPipeline"):
        distill(without, tmp_path / "out", recipe)
    with pytest.raises(ArtifactError, match=r"no folder .*nowhere; give a diffusers pipeline folder"):
        distill(tmp_path / "nowhere", tmp_path / "out", recipe)
    with pytest.raises(ArtifactError, match="the teacher itself"):
        distill(teacher, teacher, recipe)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="refusing to replace"):
        distill(teacher, tmp_path / "taken", recipe)
    plans = {"plans": {1: [499]}, "plan_weights": {1: 1.0}}
    with pytest.raises(RecipeError, match="last time 999"):
        distill(teacher, tmp_path / "out", distill_recipe({**STUDENT, **plans}))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_run_is_refused(teacher: Path, tmp_path: Path) -> None:
    """It happened that a second recipe with the same OUT trained nothing and claimed its own settings."""
    out = tmp_path / "student"
    distill(teacher, out, distill_recipe(STUDENT))
    for change in ({"gamma": 0.5}, {"seed": 1}, {"prompts": 41}):
        with pytest.raises(ArtifactError, match="another recipe, teacher or version"):
            distill(teacher, out, distill_recipe({**STUDENT, **change}))
    distill(teacher, out, distill_recipe(STUDENT))  # the same again is no error
    assert read_student_manifest(out).training["seconds"] > 0
    checkpoint = tmp_path / "student.run" / "checkpoints" / "student.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="not a readable checkpoint"):
        distill(teacher, out, distill_recipe(STUDENT))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"network": {"text_width": 30, "text_heads": 4}}, "does not fit together"),
        ({"network": {"channels": [10, 20], "norm_groups": 16}}, "does not fit together"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "does not fit together"),
        ({"beta_end": 2.0}, "betas must be"),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(change: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        train_teacher(TeacherRecipe.model_validate({**TINY, **change}), tmp_path / "teacher")
    assert not (tmp_path / "teacher.run" / "checkpoints").exists()
