"""The errors' helpers."""

import pytest

from imagine_flash.core import errors


def test_every_error_is_a_value_error():
    children = [errors.ScheduleError, errors.PlanError, errors.ArtifactError, errors.RecipeError]
    children += [errors.RequestError, errors.MissingExtraError, errors.ParityError]
    assert all(issubclass(child, errors.ImagineFlashError) for child in children)
    assert issubclass(errors.ImagineFlashError, ValueError)


def test_missing_extra_names_the_command():
    assert (
        str(errors.missing_extra("torch", "train"))
        == "needs torch: pip install 'imagine-flash[train]', in a checkout '.[train]'"
    )


@pytest.mark.parametrize(("name", "hint"), [("guidence", "; did you mean 'guidance'?"), ("zzz", ""), (7, "")])
def test_nearest(name, hint):
    assert errors.nearest(name, ["guidance", "gamma", "steps"]) == hint
