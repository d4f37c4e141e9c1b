"""The tokenizers of an artifact, as files that the runtime reads without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..folders.manifests import TokenizerSpec
from ..pipelines.stages import Stages
from ..pipelines.tokenizer import copy_of, tokenizers_of

END_OF_WORD, BEGIN_OF_WORD = "</w>", "▁"


def write_tokenizers(folder: Path, stages: Stages, known_words: list[str]) -> list[TokenizerSpec]:
    """Writes one tokenizer.json per tokenizer, numbered from the second on."""
    found = tokenizers_of(stages, known_words)
    for spec, tokenizer in found:
        tokenizer.save(str(folder / spec.file), pretty=False)
    return [spec for spec, _ in found]


def parity_prompts(stages: Stages, known_words: Sequence[str] = ()) -> list[str]:
    """Three prompts of 1, 4 and 8 words that the first tokenizer holds whole, always the same for one vocabulary. Where it has a
    mask, the second has as many words as fill the context."""
    draw, first = np.random.default_rng(0), stages.tokens[0]
    words = whole_words(copy_of(first), known_words)
    prompts = [" ".join(draw.choice(words, size)) for size in (1, 4, 8)]
    if first.mask is not None:
        longest = draw.choice(words, first.length).tolist()
        while len(first.tokenizer(first.text(" ".join(longest))).input_ids) > first.length:
            longest.pop()
        prompts[1] = " ".join(longest)
    return prompts


def random_prompts(tokenizer: Tokenizer, known_words: Sequence[str] = (), count: int = 16) -> list[str]:
    """Prompts of 3 to 8 words that the tokenizer holds whole, always the same for one vocabulary."""
    draw = np.random.default_rng(1)
    words = whole_words(tokenizer, known_words)
    return [" ".join(draw.choice(words, draw.integers(3, 9))) for _ in range(count)]


def whole_words(tokenizer: Tokenizer, known_words: Sequence[str] = ()) -> list[str]:
    """What a vocabulary holds as one token, in ASCII: of CLIP's its entries ending in </w>, of others those beginning with the mark
    of a word, without single characters but "a"; of a model with known words those alone, since the runtime leaves others
    out. A vocabulary without any gives "a"."""
    entries = tokenizer.get_vocab()
    words = {entry.removesuffix(END_OF_WORD) for entry in entries if entry.endswith(END_OF_WORD)}
    if not words:
        marked = (entry.removeprefix(BEGIN_OF_WORD) for entry in entries if entry.startswith(BEGIN_OF_WORD))
        words = {word for word in marked if word.isalpha()}
    words &= set(known_words or words)
    # other characters stand in a vocabulary as their bytes, which are no text
    return sorted(word for word in words if word.isascii() and (len(word) > 1 or word == "a")) or ["a"]
