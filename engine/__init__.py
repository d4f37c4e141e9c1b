"""The runtime: an artifact folder in, pictures out. NumPy, onnxruntime, tokenizers and Pillow; no torch."""

from .engine import Engine, GenerateResult
from .request import GenerateRequest

__all__ = ["Engine", "GenerateRequest", "GenerateResult"]
