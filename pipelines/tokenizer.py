"""The tokenizers of a pipeline as the runtime uses them: without transformers."""

from __future__ import annotations

from tokenizers import Tokenizer

from ..folders.manifests import TokenizerSpec
from .stages import Stages, TokenInput


def tokenizers_of(stages: Stages, known_words: list[str]) -> list[tuple[TokenizerSpec, Tokenizer]]:
    """Each tokenizer with what the runtime must know of it; the files that they may be saved as are numbered from the
    second on, and the first has the known words."""
    found = []
    for i, tokens in enumerate(stages.tokens):
        spec = TokenizerSpec(
            file=f"tokenizer{f'_{i + 1}' if i else ''}.json",
            context_length=tokens.length,
            input=tokens.name,
            mask=tokens.mask,
            known_words=[] if i else known_words,
            lowercase=tokens.lowercase,
            prefix=tokens.prefix,
        )
        found.append((spec, _padding(tokens)))
    return found


def copy_of(tokens: TokenInput) -> Tokenizer:
    """A copy of the `tokenizers` object inside a transformers tokenizer."""
    return Tokenizer.from_str(tokens.tokenizer.backend_tokenizer.to_str())


def _padding(tokens: TokenInput) -> Tokenizer:
    """Pads to the context; cuts only where another encoder reads the whole prompt."""
    tokenizer, source = copy_of(tokens), tokens.tokenizer
    tokenizer.no_truncation()
    if tokens.truncates:
        tokenizer.enable_truncation(tokens.length)
    tokenizer.enable_padding(length=tokens.length, pad_id=source.pad_token_id, pad_token=str(source.pad_token))
    return tokenizer
