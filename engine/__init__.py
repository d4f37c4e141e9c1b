"""The runtime: an artifact folder in, pictures out. NumPy, onnxruntime, tokenizers and Pillow; no torch."""

from .engine import Engine
from .request import GenerateRequest
from .work import GenerateResult, Timings

__all__ = ["Engine", "GenerateRequest", "GenerateResult", "Timings"]
