"""The errors a user can cause. Each message is one line that names the value and the way out."""

import difflib
from collections.abc import Iterable


class ImagineFlashError(ValueError):
    """Base of everything a user can get wrong; the command line prints it as one line and exits with 2.

    param: the parameter to blame, by its name in requests.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ScheduleError(ImagineFlashError):
    """A noise schedule or a prediction type that is unknown, or whose closed form is undefined."""


class PlanError(ImagineFlashError):
    """Timesteps that cannot be visited, or a number of steps the model was not distilled for."""


class ArtifactError(ImagineFlashError):
    """A student or artifact folder that is missing, damaged, of another kind or not writable."""


class RecipeError(ImagineFlashError):
    """A recipe with an unknown key or a wrong value."""


class RequestError(ImagineFlashError):
    """A request for pictures that cannot be answered."""


class EngineError(ImagineFlashError):
    """The engine could not draw: a backend failed, gave NaN, or the engine is closed."""


class LoadingError(EngineError):
    """The model is not there yet."""


class ExpiredError(EngineError):
    """A request that was not drawn within its time."""


class BusyError(EngineError):
    """More requests wait than the engine takes; the same request may succeed later."""


class Interrupted(ImagineFlashError):
    """Somebody stopped a work that kept what it had done; the message says how to go on."""


class MissingExtraError(ImagineFlashError):
    """An optional package is not installed."""


class ParityError(ImagineFlashError):
    """An exported graph differs from the torch module by more than is allowed."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """The error to raise when `package`, which comes with the extra `extra`, cannot be imported."""
    return MissingExtraError(f"needs {package}: pip install 'imagine-flash[{extra}]', in a checkout '.[{extra}]'")


def nearest(name: object, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the known name closest to `name`, or '' if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
