"""A recipe says what is wrong with it in one line."""

import pytest

from imagine_flash.core.errors import RecipeError
from imagine_flash.distill.methods import METHODS, load_distill_recipe
from imagine_flash.distill.recipe import TeacherRecipe, built_in_recipes, load_recipe


def test_what_is_built_in_is_valid() -> None:
    """A recipe for each method, of the same name."""
    assert set(built_in_recipes()) == {"teacher", "teacher_epsilon", "judge", "evaluation", *METHODS}
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
        ("plans: {}\nfit: {steps: 1}", "plans = {}"),
        ("plan_weights: {1: 0, 2: 0, 3: 0}\nfit: {steps: 1}", "must not all be 0"),
        ("plan_weights: {1: -1, 2: 1, 3: 1}\nfit: {steps: 1}", "plan_weights.1 = -1"),
        ("guidance: [.nan, 2]\nfit: {steps: 1}", "guidance.0 = nan"),
        ("guidance: [3, 2]\nfit: {steps: 1}", "guidance"),
        ("gamma: 0.5", "key 'fit' is missing"),
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
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'imagine_flash'.*built in"):
        load_distill_recipe("imagine_flsh")


def test_a_recipe_is_frozen() -> None:
    recipe = load_distill_recipe("imagine_flash")
    with pytest.raises(ValueError, match="frozen"):
        recipe.gamma = 0.5  # type: ignore[misc]
