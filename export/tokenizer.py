"""The tokenizers of an artifact, as files that the runtime reads without transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, normalizers

from ..core.artifact import TokenizerSpec
from .stages import Stages, TokenInput

END_OF_WORD = "</w>"


def write_tokenizers(folder: Path, stages: Stages, known_words: list[str]) -> list[TokenizerSpec]:
    """Writes one tokenizer.json per tokenizer, numbered from the second on."""
    specs = []
    for i, tokens in enumerate(stages.tokens):
        file = f"tokenizer{f'_{i + 1}' if i else ''}.json"
        _write(folder / file, tokens)
        words = known_words if i == 0 else []
        specs.append(
            TokenizerSpec(
                file=file, context_length=tokens.length, input=tokens.name, mask=tokens.mask, known_words=words
            )
        )
    return specs


def parity_prompts(stages: Stages) -> list[str]:
    """Three prompts of 1, 4 and 8 words that the first tokenizer holds whole, always the same for one vocabulary."""
    draw = np.random.default_rng(0)
    words = whole_words(_backend(stages.tokens[0])) or ["a"]
    return [" ".join(draw.choice(words, size)) for size in (1, 4, 8)]


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """What a CLIP vocabulary holds as one token: its entries ending in </w>, without single characters but "a"."""
    words = {entry.removesuffix(END_OF_WORD) for entry in tokenizer.get_vocab() if entry.endswith(END_OF_WORD)}
    return sorted(word for word in words if len(word) > 1 or word == "a")


def _write(path: Path, tokens: TokenInput) -> None:
    """Pads to the context; cuts only where another encoder reads the whole prompt."""
    tokenizer, source = _backend(tokens), tokens.tokenizer
    tokenizer.no_truncation()
    if tokens.truncates:
        tokenizer.enable_truncation(tokens.length)
    if tokens.lowercase:
        first = [normalizers.Lowercase(), normalizers.Strip()]
        tokenizer.normalizer = normalizers.Sequence([*first, *([tokenizer.normalizer] if tokenizer.normalizer else [])])
    tokenizer.enable_padding(length=tokens.length, pad_id=source.pad_token_id, pad_token=str(source.pad_token))
    tokenizer.save(str(path), pretty=False)


def _backend(tokens: TokenInput) -> Tokenizer:
    """A copy of the `tokenizers` object inside a transformers tokenizer."""
    return Tokenizer.from_str(tokens.tokenizer.backend_tokenizer.to_str())
