"""Imagine Flash: distil a diffusion model into a 1-3 step student, export it, and draw with it at the lowest latency.

The public names are imported when first used, so that `import imagine_flash` brings in neither NumPy nor torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.schedule import NoiseSchedule
    from .engine import Engine

    __version__: str

__all__ = ["Engine", "NoiseSchedule", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from .engine import Engine as value
    elif name == "NoiseSchedule":
        from .core.schedule import NoiseSchedule as value
    elif name == "__version__":
        from importlib.metadata import version

        value = version("imagine-flash")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
