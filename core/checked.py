"""What a user asks for, as a model that refuses with one line of our own instead of pydantic's report."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ImagineFlashError, RequestError, nearest


class Checked(BaseModel):
    """Keyword-only, frozen and closed. Raises `refusal`, RequestError unless a subclass says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    refusal: ClassVar[type[ImagineFlashError]] = RequestError

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = str(problem["loc"][0]) if problem["loc"] else ""
            message = self.one_line(name, str(problem["type"]), str(problem["msg"]), problem["input"])
            raise self.refusal(message, param=name or None) from None

    @classmethod
    def one_line(cls, name: str, kind: str, message: str, value: Any) -> str:
        """What is wrong with the field `name` ("" for the whole); kind and message are pydantic's."""
        if kind == "extra_forbidden":
            return f"there is no {name!r}{nearest(name, cls.model_fields)}"
        message = message.removeprefix("Value error, ")
        return f"{name}: {message}, got {value!r}" if name else message
