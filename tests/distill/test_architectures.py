"""Every class of pipeline, tiny and of the real classes: distilled, resumed, saved, loaded in diffusers, drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from imagine_flash.core.errors import ArtifactError
from imagine_flash.core.sampler import Sampler
from imagine_flash.distill.backward import table_of
from imagine_flash.distill.methods import METHODS, distill_recipe, load_distill_recipe
from imagine_flash.distill.models import Model, load_model, model_of, noise_of, noises_of
from imagine_flash.distill.saving import stock_scheduler
from imagine_flash.distill.student import distill
from imagine_flash.folders.reading import read_student_manifest
from imagine_flash.tests.architectures import BUILDERS, DRAWN
from imagine_flash.tests.pipelines import CAPTIONS, build_pipeline

PROMPTS: list[str] = list(CAPTIONS)
FIT = {"steps": 2, "batch": 2, "schedule": "constant", "warmup": 0, "learning_rate": 1e-3, "preview_every": 2}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory):
    """A teacher folder of each class, made when it is first asked for."""
    made: dict[str, Path] = {}

    def teacher(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "teacher"
            BUILDERS[kind]().save_pretrained(made[kind], safe_serialization=True)
        return made[kind]

    return teacher


def latents_by_plan(model: Model, steps: int, recipe: Any) -> torch.Tensor:
    """What the student draws of "a cat" from seed 5 by its plan."""
    sampler = METHODS[recipe.method].sampler
    table = table_of(model.denoiser, recipe.plans[steps], noise_correction=recipe.noise_correction, sampler=sampler)
    noise, fresh = noise_of([5], model.latent_shape), noises_of([5], model.latent_shape, table)
    return model.sample(noise, model.embed(["a cat"]), table, noises=fresh)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("sd21", "sdxl"))) for kind in BUILDERS]
)
def test_distilled_resumed_saved_loaded_and_drawn(kind: str, teachers, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    from imagine_flash.pipelines.scheduler import ImagineFlashScheduler

    values = {"method": "imagine_flash", "loss_weight": "truncated_snr", "teacher_steps": 2}
    recipe = distill_recipe({**values, "fit": FIT})
    distill(teachers(kind), tmp_path / "whole", recipe, prompts=PROMPTS)
    for steps in (1, 2):  # stopped after one update, then on to the second
        again = distill_recipe({**values, "fit": {**FIT, "steps": steps}})
        distill(teachers(kind), tmp_path / "resumed", again, prompts=PROMPTS)
    whole, resumed = (load_model(tmp_path / name) for name in ("whole", "resumed"))
    theirs = resumed.network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.network.state_dict().items())
    before = load_model(teachers(kind)).network.half().state_dict()
    assert any(not torch.equal(value.half(), before[name]) for name, value in theirs.items())
    assert (tmp_path / "whole.run" / "previews" / "student-000002.png").is_file()

    pipeline: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "whole"), dtype=torch.float32)
    assert type(pipeline).__name__ == whole.stages.pipeline
    pipeline.scheduler = ImagineFlashScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    side = whole.stages.default_size[0]
    options: dict[str, Any] = {"guidance_scale": 1.0, "output_type": "latent", "height": side, "width": side}
    if "PixArt" in whole.stages.pipeline:
        options |= {"use_resolution_binning": False, "clean_caption": False}
    noise = noise_of([5], whole.latent_shape)
    got = pipeline("a cat", num_inference_steps=2, latents=noise, **options).images
    torch.testing.assert_close(got, latents_by_plan(whole, 2, recipe), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_guidance_leads_away_from_what_the_class_says(kind: str, teachers, tmp_path: Path) -> None:
    """XL's pipelines take zeros for no prompt; a negative prompt is embedded by all."""
    model = load_model(teachers(kind))
    empty, own = model.embed_negative(), model.embed([""])
    assert all(torch.equal(e, torch.zeros_like(e) if kind == "sdxl" else o) for e, o in zip(empty, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.embed_negative("a dog"), model.embed(["a dog"]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "imagine_flash"])
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "pixart"])
def test_every_method_on_every_prediction(kind: str, method: str, teachers) -> None:
    """Two updates with latents of pictures: the loss is finite, and moves the student."""
    from imagine_flash.distill.reproducible import Part
    from imagine_flash.distill.task import DistillTask

    model = load_model(teachers(kind))
    recipe = distill_recipe({"method": method, "fit": FIT})
    pictures = torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(1))
    task = DistillTask(recipe, model, PROMPTS, "", pictures=[pictures])
    for step in range(2):
        loss = task.module(**task.batch(step, Part()))
        loss.backward()
        assert loss.isfinite()
    gradients = [p.grad for p in task.student.network.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


def test_a_re_noising_student_says_so(teachers, tmp_path: Path) -> None:
    """Its manifest has the sampler, which our scheduler in diffusers takes, and stock diffusers draws with LCMScheduler at the
    plan's times."""
    from diffusers import DiffusionPipeline

    from imagine_flash.pipelines.scheduler import ImagineFlashScheduler

    recipe = distill_recipe({"method": "dmd2", "gan_weight": 0, "plans": {2: [999, 499]}, "fit": FIT})
    distill(teachers("sd15"), tmp_path / "student", recipe, prompts=PROMPTS)
    manifest = read_student_manifest(tmp_path / "student")
    assert manifest.sampler.kind == "renoise" and not manifest.noise_correction
    pipeline: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "student"), dtype=torch.float32)
    pipeline.scheduler.set_timesteps(2)
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    assert pipeline.scheduler.timesteps.tolist() == [999, 499]
    ours: Any = ImagineFlashScheduler.from_config(pipeline.scheduler.config)
    ours.set_timesteps(2)
    assert ours.timesteps.tolist() == [999, 499] and ours.sampler == manifest.sampler


@pytest.mark.parametrize("recipe", ["lcm", "dmd2", "add"])
def test_stock_diffusers_draws_at_every_plans_times(recipe: str) -> None:
    """Of the built-in recipes whose students re-noise: LCM's plans are of its own grid, the others' of their longest one."""
    model, plans = model_of(build_pipeline()), load_distill_recipe(recipe).plans
    scheduler = stock_scheduler(model, Sampler(kind="renoise"), {str(n): plan for n, plan in plans.items()})
    for steps, plan in plans.items():
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.tolist()) == plan


def test_a_flows_student_draws_its_plan_where_diffusers_is_given_it(teachers, tmp_path: Path) -> None:
    """By itself its scheduler ends elsewhere than any plan; what docs/diffusers.md says instead lands on the student's steps."""
    from diffusers import DiffusionPipeline

    recipe = distill_recipe({"plans": {3: [999, 666, 333]}, "teacher_steps": 1, "fit": {**FIT, "steps": 1}})
    distill(teachers("sd3"), tmp_path / "student", recipe, prompts=PROMPTS)
    pipe: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "student"), dtype=torch.float32)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    pipe.scheduler.set_timesteps(3)
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 751.1, 8.9], abs=0.05)
    page = (Path(__file__).parents[2] / "docs/diffusers.md").read_text(encoding="utf-8")
    pipe.vae.register_to_config(shift_factor=0.1)  # as Stable Diffusion 3's own has one
    scope: dict[str, Any] = {"pipe": pipe}
    exec(page.split("needs a student of Stable Diffusion 3 -->\n```python\n")[1].split("```")[0], scope)
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 857.3, 600.7], abs=0.05)


@pytest.mark.parametrize(("kind", "says"), [("flux", "has not been tried"), ("sana", "is told a guidance scale")])
def test_what_is_drawn_with_and_not_distilled(kind: str, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        model_of(DRAWN[kind]())


def test_a_pipeline_with_a_controlnet_is_not_distilled() -> None:
    from diffusers import StableDiffusionControlNetPipeline

    from imagine_flash.tests.control import build_controlnet

    plain = BUILDERS["sd15"]()
    controlnet = build_controlnet(plain.unet)
    parts = {**plain.components, "controlnet": controlnet}
    controlled = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ArtifactError, match="not distilled; give the pipeline without its ControlNetModel"):
        model_of(controlled)
