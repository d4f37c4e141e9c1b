"""A CLIP-style tokenizer, trained on the captions of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], *, context: int, vocabulary: int = 4096) -> CLIPTokenizer:
    """Byte-level BPE with `</w>` word ends, as CLIP's. Large enough a vocabulary gives each word of the captions one token;
    words it never saw fall into letters. Padding is the end token, as in Stable Diffusion 1.x."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # type: ignore[assignment]
    pieces = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(pieces), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        initial_alphabet=alphabet,
        special_tokens=endings,  # else they are numbered as a hash table yields them, and merges of one frequency follow
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    bpe.train_from_iterator(captions, trainer)
    trained = json.loads(bpe.to_str())["model"]
    # CLIP's order: the letters, the letters that end a word, what was merged, then the two marks
    letters = alphabet + endings
    merges: Any = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    tokens = list(dict.fromkeys(letters + ["".join(m) for m in merges] + [START, END]))
    vocabulary_ids = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary_ids,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=context,
    )
