"""From a prompt to token ids, and which of its words the model has never seen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.artifact import TokenizerSpec
from ..core.errors import ArtifactError, RequestError, missing_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORD = re.compile(r"[^\W_]+")


class PromptTokenizer:
    """Wraps a `tokenizers` tokenizer that pads to `context_length` and does not truncate."""

    def __init__(self, tokenizer: Tokenizer, spec: TokenizerSpec) -> None:
        self.tokenizer, self.context_length = tokenizer, spec.context_length
        self.known_words = frozenset(spec.known_words)

    @classmethod
    def load(cls, folder: Path, spec: TokenizerSpec) -> PromptTokenizer:
        """Read the tokenizer of an artifact folder. Raises ArtifactError, MissingExtraError."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise missing_extra("tokenizers", "cpu") from None
        try:
            return cls(Tokenizer.from_file(str(folder / spec.file)), spec)
        except Exception as error:  # the library raises a bare Exception
            raise ArtifactError(
                f"{folder / spec.file} is not a tokenizer ({error}); export the student again"
            ) from None

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """int64 (L,). RequestError for a prompt that does not fit the context; nothing is cut silently."""
        ids = self.tokenizer.encode(prompt).ids
        if len(ids) > self.context_length:
            room = self.context_length - 2
            raise RequestError(f"the prompt has {len(ids) - 2} tokens, this model reads {room}; shorten it")
        return np.asarray(ids, dtype=np.int64)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that training never showed, in order, each once; none where the model lists no words."""
        if not self.known_words:
            return []
        words = dict.fromkeys(word.lower() for word in _WORD.findall(prompt))
        return [word for word in words if word not in self.known_words]
