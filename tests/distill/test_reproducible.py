"""Which trainings are one: what may change between a run and its resume, and what may not."""

from typing import Any

import pytest

from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.recipe import Fit, TeacherRecipe
from imagine_flash.distill.reproducible import fingerprint

FIT: dict[str, Any] = {"steps": 1000, "schedule": "constant"}


@pytest.mark.parametrize(
    "change",
    [{"preview_every": 7}, {"checkpoint_minutes": 1}, {"validate_every": 5, "keep_best": True}, {"accumulate": 2}],
)
def test_how_often_a_run_looks_and_how_it_computes_may_change(change: dict[str, Any]) -> None:
    """The judge's Fit by itself and the autoencoder's inside a teacher's recipe were held to it, which refused the resume."""
    recipe, fit = distill_recipe({"fit": FIT}), Fit.model_validate(FIT)
    assert fingerprint(recipe) == fingerprint(distill_recipe({"fit": {**FIT, **change}}))
    assert fingerprint(fit) == fingerprint(Fit.model_validate({**FIT, **change}))
    teacher = TeacherRecipe.model_validate({"fit": FIT, "autoencoder": {"fit": FIT}})
    changed = TeacherRecipe.model_validate({"fit": FIT, "autoencoder": {"fit": {**FIT, **change}}})
    assert fingerprint(teacher) == fingerprint(changed)
    assert fingerprint(recipe) == fingerprint(distill_recipe({"gradient_checkpointing": True, "fit": FIT}))


@pytest.mark.parametrize(
    ("values", "may"),
    [({}, True), ({"method": "lcm"}, True), ({"method": "flash"}, False), ({"method": "step_distillation"}, False)],
)
def test_the_length_may_change_where_nothing_depends_on_it(values: dict[str, Any], may: bool) -> None:
    """With a constant rate; but in a longer run update 600 is of another phase of flash, of another round of step_distillation."""
    one, longer = (distill_recipe({**values, "fit": {**FIT, "steps": steps}}) for steps in (1000, 2000))
    assert (fingerprint(one) == fingerprint(longer)) == may
    falling = (distill_recipe({**values, "fit": {"steps": steps, "schedule": "cosine"}}) for steps in (1000, 2000))
    assert len(set(map(fingerprint, falling))) == 2


def test_what_decides_what_is_learned_may_not() -> None:
    changes = [{}, {"gamma": 0.5}, {"seed": 1}, {"adversarial": {"ramp": 3}}, {"fit": {**FIT, "batch": 2}}]
    assert len({fingerprint(distill_recipe({"fit": FIT, **change})) for change in changes}) == len(changes)
