"""From a prompt to token ids, and which of its words the model has never seen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.artifact import TokenizerSpec
from ..core.errors import ArtifactError, RequestError, missing_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = dict[str, NDArray[np.int64]]  # (B, L) by input of the text encoder
_WORD = re.compile(r"[^\W_]+")


class PromptTokenizer:
    """Wraps the `tokenizers` tokenizers of an artifact, one per text encoder; each pads to its context length."""

    def __init__(self, tokenizers: Sequence[Tokenizer], specs: Sequence[TokenizerSpec]) -> None:
        self.tokenizers, self.specs = list(tokenizers), list(specs)
        self.known_words = frozenset(word for spec in specs for word in spec.known_words)

    @classmethod
    def load(cls, folder: Path, specs: Sequence[TokenizerSpec]) -> PromptTokenizer:
        """Read the tokenizers of an artifact folder. Raises ArtifactError, MissingExtraError."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise missing_extra("tokenizers", "cpu") from None
        loaded = []
        for spec in specs:
            try:
                loaded.append(Tokenizer.from_file(str(folder / spec.file)))
            except Exception as error:  # the library raises a bare Exception
                raise ArtifactError(
                    f"{folder / spec.file} is not a tokenizer ({error}); export the student again"
                ) from None
        return cls(loaded, specs)

    def encode(self, prompt: str) -> Tokens:
        """What the text encoder takes: int64 (1, L) by input name. RequestError for a prompt that does not fit the
        context; nothing is cut silently (but where another encoder reads all of it)."""
        tokens: Tokens = {}
        for tokenizer, spec in zip(self.tokenizers, self.specs, strict=True):
            found = tokenizer.encode(prompt)
            if len(found.ids) > spec.context_length:
                added = tokenizer.num_special_tokens_to_add(False)
                room, needed = spec.context_length - added, len(found.ids) - added
                raise RequestError(
                    f"the prompt has {needed} tokens, this model reads {room}; shorten it", param="prompt"
                )
            tokens[spec.input] = np.asarray([found.ids], dtype=np.int64)
            if spec.mask is not None:
                tokens[spec.mask] = np.asarray([found.attention_mask], dtype=np.int64)
        return tokens

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that training never showed, in order, each once; none where the model lists no words."""
        if not self.known_words:
            return []
        words = dict.fromkeys(word.lower() for word in _WORD.findall(prompt))
        return [word for word in words if word not in self.known_words]
