"""From a student folder to an artifact folder: ONNX graphs, shared weights, a manifest, and proof that they agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .student import export_student

__all__ = ["export_student"]


def __getattr__(name: str) -> Any:
    if name != "export_student":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .student import export_student

    return export_student
