"""From a student to an artifact folder: ONNX graphs, shared weights, a manifest, and proof that they agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import ExportOptions
    from .student import export_student

__all__ = ["ExportOptions", "export_student"]


def __getattr__(name: str) -> Any:
    if name == "ExportOptions":
        from .options import ExportOptions

        return ExportOptions
    if name == "export_student":
        from .student import export_student

        return export_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
