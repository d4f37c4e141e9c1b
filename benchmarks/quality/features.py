"""Features of pictures and captions by a model of transformers: CLIP, SigLIP, DINOv2."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...core.errors import ArtifactError, ImagineFlashError
from ...folders.hub import local_folder

_BATCH = 32


class Features:
    """A vision model, and its text model where it has one (CLIP). name: a folder or hub id; weights are safetensors."""

    def __init__(self, name: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        folder = local_folder(name)
        if not (folder / "config.json").is_file():
            raise ArtifactError(f"{folder} is no model of transformers: it has no config.json")
        try:
            model: Any = AutoModel.from_pretrained(str(folder), use_safetensors=True)
            self.processor: Any = AutoImageProcessor.from_pretrained(str(folder))
            self.model = model.eval().to(device)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder)) if self.reads else None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{name} gives no features: {str(error).strip().splitlines()[0]}") from None
        self.name, self.device = name, device

    @property
    def reads(self) -> bool:
        """Whether captions have features too, beside those of pictures."""
        return hasattr(self.model, "get_text_features")

    @torch.no_grad()
    def of_pictures(self, files: Mapping[str, bytes]) -> np.ndarray:
        """float64 (N, D), of pictures by name. Raises ImagineFlashError."""
        named = list(files.items())
        return np.concatenate([self._pictures(named[i : i + _BATCH]) for i in range(0, len(named), _BATCH)])

    @torch.no_grad()
    def of_captions(self, texts: Sequence[str]) -> np.ndarray:
        """float64 (N, D), of a model that reads; captions are cut at its context."""
        return np.concatenate([self._captions(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)])

    def _pictures(self, files: Iterable[tuple[str, bytes]]) -> np.ndarray:
        images = [_opened(name, data) for name, data in files]
        pixels = self.processor(images=images, return_tensors="pt").to(self.device)
        found = self.model.get_image_features(**pixels) if self.reads else self.model(**pixels)
        return _pooled(found)

    def _captions(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return _pooled(self.model.get_text_features(**tokens))


def _opened(name: str, data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ImagineFlashError(f"the picture {name!r} cannot be read; draw or copy it again") from None


def _pooled(found: Any) -> np.ndarray:
    """One row of features for each input: transformers 5 gives them inside an output, 4 as they are."""
    rows = found if isinstance(found, torch.Tensor) else found.pooler_output
    return rows.double().cpu().numpy()
