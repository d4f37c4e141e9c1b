"""A recipe says what is wrong with it in one line."""

from pathlib import Path

import pytest

from imagine_flash.core.errors import RecipeError
from imagine_flash.distill.methods import METHODS, distill_recipe, load_distill_recipe
from imagine_flash.distill.recipe import TeacherRecipe, built_in_recipes, load_recipe

CLASSES = {"sd": "sd15", "sdxl": "sdxl", "pixart": "pixart", "sd3": "sd3"}  # recipe -> a pipeline of that class
OF_CLASSES = [*CLASSES, *(f"{name}_lora" for name in CLASSES if name != "pixart")]  # diffusers' PixArt reads none


def test_what_is_built_in_is_valid() -> None:
    """A recipe for each method, of the same name; two for each class of teachers."""
    assert set(built_in_recipes()) == {"teacher", "teacher_epsilon", "judge", "evaluation", *METHODS, *OF_CLASSES}
    v, epsilon = (load_recipe(name, TeacherRecipe) for name in ("teacher", "teacher_epsilon"))
    assert (v.seed, v.network, v.beta_schedule) == (epsilon.seed, epsilon.network, epsilon.beta_schedule)
    for name in METHODS:
        assert load_distill_recipe(name).method == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gama: 0.5\nfit: {steps: 1}", "did you mean 'gamma'"),
        ("fit: {step: 1}", "did you mean 'steps'"),
        ("gamma: high\nfit: {steps: 1}", "gamma = 'high'"),
        ("gamma: 1.5\nfit: {steps: 1}", "gamma = 1.5"),
        ("teacher_steps: 0\nfit: {steps: 1}", "teacher_steps = 0"),
        ("renoise: mine\nfit: {steps: 1}", "renoise = 'mine'"),
        ("plans: {2: [999]}\nplan_weights: {2: 1}\nfit: {steps: 1}", "2 steps must have 2 timesteps"),
        ("plans: {2: [499, 999]}\nplan_weights: {2: 1}\nfit: {steps: 1}", "999"),
        ("plans: {1: [999]}\nplan_weights: {2: 1}\nfit: {steps: 1}", "plan_weights"),
        ("seed: -1\nfit: {steps: 1}", "seed = -1"),
        ("fit: {steps: 1, betas: [0.9, 1.0]}", "fit.betas.1 = 1.0"),
        ("fit: {steps: 1, mixed_precision: yes}", "fit.mixed_precision = True"),
        ("plans: {}\nfit: {steps: 1}", "plans = {}"),
        ("plan_weights: {1: 0, 2: 0, 3: 0}\nfit: {steps: 1}", "must not all be 0"),
        ("plan_weights: {1: -1, 2: 1, 3: 1}\nfit: {steps: 1}", "plan_weights.1 = -1"),
        ("guidance: [.nan, 2]\nfit: {steps: 1}", "guidance.0 = nan"),
        ("guidance: [3, 2]\nfit: {steps: 1}", "guidance"),
        ("gamma: 0.5", "key 'fit' is missing"),
        (
            "teacher_dtype: float16\nfit: {steps: 1, mixed_precision: bf16}",
            "float16 cannot compute under mixed_precision",
        ),
        ("lora: {rank: 4}\nteacher_dtype: float16\nfit: {steps: 1}", "float16 rounds most of a LoRA's gradients to 0"),
        (
            "method: lcm\nplan_weights: {1: 1, 2: 1, 3: 2}\nfit: {steps: 1}",
            "plan_weights: lcm draws times of its own and no plans; leave it out",
        ),
        ("method: flash\nplan_weights: {1: 1, 2: 1, 4: 2}\nfit: {steps: 1}", "plan_weights: flash draws"),
        ("- 1", "must hold keys and values"),
        ("a: [", "is not YAML"),
        ("fit: 3", "fit = 3"),
        ("method: lmc\nfit: {steps: 1}", "no method 'lmc'"),
    ],
)
def test_bad_recipes(tmp_path, text: str, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_distill_recipe(path)
    assert says in str(error.value) and "\n" not in str(error.value) and "Value error" not in str(error.value)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_the_recipe_of_a_class_trains_it(name: str, tmp_path: Path) -> None:
    """All its keys but the sizes, on a tiny pipeline of that class; the student's folder is one that draws."""
    from imagine_flash.distill.models import load_model
    from imagine_flash.distill.student import distill
    from imagine_flash.tests.architectures import DRAWN
    from imagine_flash.tests.pipelines import CAPTIONS

    teacher, recipe = tmp_path / "teacher", tmp_path / "recipe.yaml"
    DRAWN[CLASSES[name.removesuffix("_lora")]]().save_pretrained(teacher, safe_serialization=True)
    recipe.write_text(f"base: {name}\nteacher_steps: 2\nfit: {{steps: 1, batch: 2, accumulate: 1, preview_every: 0}}")
    parsed = load_distill_recipe(recipe)
    assert parsed.method == "imagine_flash" and (parsed.lora is not None) == name.endswith("_lora")
    assert parsed.guidance == load_distill_recipe(name).guidance and parsed.fit.mixed_precision == "bf16"
    distill(teacher, tmp_path / "student", parsed, prompts=list(CAPTIONS))
    if parsed.lora is None:
        assert load_model(tmp_path / "student").stages.pipeline == load_model(teacher).stages.pipeline
    else:
        assert list((tmp_path / "student").glob("*lora*.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "precision", "cached"),
    [("bfloat16", "bf16", True), ("bfloat16", "bf16", False), ("float16", "no", True), ("float16", "no", False)],
)
def test_a_half_teacher_guides(dtype: str, precision: str, cached: bool, teacher: Path, tmp_path: Path) -> None:
    """Autocast to bfloat16 joins no float16: cached embeddings with a bfloat16 teacher failed."""
    from imagine_flash.distill.student import distill
    from imagine_flash.tests.pipelines import CAPTIONS

    fit = {"steps": 1, "batch": 2, "mixed_precision": precision, "preview_every": 0}
    values = {"teacher_dtype": dtype, "cache_text": cached, "teacher_steps": 1, "guidance": [2.0, 2.0], "fit": fit}
    distill(teacher, tmp_path / "student", distill_recipe(values), prompts=list(CAPTIONS))
    assert (tmp_path / "student" / "imagine_flash.json").is_file()


def test_a_recipe_holds_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: sdxl_lora\nfit: {steps: 7}\n")
    mine, whole = load_distill_recipe(tmp_path / "mine.yaml"), load_distill_recipe("sdxl")
    assert mine.fit == whole.fit.model_copy(update={"steps": 7, "learning_rate": 5e-5})
    assert mine.lora.rank == 64 and mine.model_copy(update={"lora": None, "fit": whole.fit}) == whole
    (tmp_path / "one.yaml").write_text(f"base: {tmp_path / 'two.yaml'}\nfit: {{steps: 1}}")
    (tmp_path / "two.yaml").write_text(f"base: {tmp_path / 'one.yaml'}")
    for text, says in (("base: sdlx", "did you mean 'sdxl'"), ("base: [sd]", "must be the name or path of a recipe")):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(RecipeError, match=says):
            load_distill_recipe(tmp_path / "mine.yaml")
    with pytest.raises(RecipeError, match=r"one\.yaml is its own base, by way of .*two\.yaml"):
        load_distill_recipe(tmp_path / "one.yaml")


def test_the_recipe_of_a_teacher_has_a_base_too(tmp_path: Path) -> None:
    """train-teacher answered: unknown key 'base'."""
    (tmp_path / "mine.yaml").write_text("base: teacher\nfit: {steps: 7}\n")
    whole = load_recipe("teacher", TeacherRecipe)
    mine = load_recipe(tmp_path / "mine.yaml", TeacherRecipe)
    assert mine == whole.model_copy(update={"fit": whole.fit.model_copy(update={"steps": 7})})


def test_no_precision_is_written_as_the_docs_spell_it(tmp_path: Path) -> None:
    """YAML reads a bare no as false, which was refused."""
    (tmp_path / "mine.yaml").write_text("base: sd_lora\nfit: {mixed_precision: no}\n")
    assert load_distill_recipe(tmp_path / "mine.yaml").fit.mixed_precision == "no"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'imagine_flash'.*built in"):
        load_distill_recipe("imagine_flsh")


def test_a_recipe_is_frozen() -> None:
    recipe = load_distill_recipe("imagine_flash")
    with pytest.raises(ValueError, match="frozen"):
        recipe.gamma = 0.5  # type: ignore[misc]
