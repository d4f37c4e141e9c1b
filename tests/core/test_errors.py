"""The errors' helpers."""

import pytest

from imagine_flash.core import errors


def test_every_error_is_a_value_error():
    found = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    assert len(found) >= 10 and all(issubclass(one, errors.ImagineFlashError) for one in found)
    assert issubclass(errors.ImagineFlashError, ValueError)


def test_missing_extra_names_the_command():
    assert (
        str(errors.missing_extra("torch", "train"))
        == "needs torch: pip install 'imagine-flash[train]', in a checkout '.[train]'"
    )


@pytest.mark.parametrize(("name", "hint"), [("guidence", "; did you mean 'guidance'?"), ("zzz", ""), (7, "")])
def test_nearest(name, hint):
    assert errors.nearest(name, ["guidance", "gamma", "steps"]) == hint
