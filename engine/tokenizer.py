"""From a prompt to token ids, and what a model with a known vocabulary makes of words that it never saw."""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ArtifactError, RequestError
from ..folders.manifests import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Tokens = dict[str, NDArray[np.int64]]  # (B, L) by input of the text encoder
_PIECE = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")  # a word, a number, or one sign
_POSSESSIVE = re.compile(r"(?<=\w)['\u2019]s\b")
_SELECTORS = re.compile("[\ufe00-\ufe0f\u200d\U0001f3fb-\U0001f3ff]")  # which say how an emoji looks
MOST_CHUNKS = 8  # of a long prompt that is joined
LETTERS_READ = 16  # of a long text, for each token that the model reads; most tokens have 4 or 5
_SHORTEST = 4  # letters of a word in which a typo is mended: below, every word is near to another


def rows_of_prompt(tokens: Tokens) -> int:
    """Chunks of the context that a prompt takes."""
    return len(next(iter(tokens.values())))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A prompt as the model is given it, and a negative one, whose words are not looked up. unknown: words and signs left out.
    replaced: typos by the words they stand for. cut: the end of a long prompt, which the model has no room for; cut_negative: that
    of a long negative one."""

    text: str
    negative: str = ""
    cut: str = ""
    cut_negative: str = ""
    unknown: list[str] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)


class PromptTokenizer:
    """Wraps the `tokenizers` tokenizers of an artifact, one per text encoder; each pads to its context length.

    joins: a prompt that is longer than the context is read in chunks of it, a row of tokens each, instead of cut; CLIP's
    encoders read such chunks well, whose embeddings are then one after another (as A1111 and compel do).
    """

    def __init__(self, tokenizers: Sequence[Tokenizer], specs: Sequence[TokenizerSpec], *, joins: bool = False) -> None:
        """Raises RequestError where the encoders' chunks cannot be joined."""
        self.tokenizers, self.specs, self.joins = list(tokenizers), list(specs), joins
        if joins and any(spec.mask for spec in specs):
            raise RequestError("joined long_prompts are for models whose only text encoders are CLIP's")
        self.known_words = frozenset(word for spec in specs for word in spec.known_words)

    @classmethod
    def load(cls, folder: Path, specs: Sequence[TokenizerSpec]) -> PromptTokenizer:
        """Read the tokenizers of an artifact folder. Raises ArtifactError."""
        from tokenizers import Tokenizer

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
        """What the text encoder takes: int64 (1, L) by input name, (n, L) of n joined chunks. RequestError for a prompt that does
        not fit the context, which `read` would have cut; nothing is cut silently (but where another encoder reads all of it)."""
        if self.joins:
            return self._chunks(prompt)
        tokens: Tokens = {}
        for tokenizer, spec in zip(self.tokenizers, self.specs, strict=True):
            found = tokenizer.encode(spec.text(prompt))
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

    def padded(self, tokens: Tokens, chunks: int) -> Tokens:
        """With chunks of the empty prompt after those of `tokens`, so that there are so many."""
        empty = self.encode("")
        more = chunks - rows_of_prompt(tokens)
        return {name: np.concatenate([ids, *[empty[name]] * more]) for name, ids in tokens.items()}

    def _chunks(self, prompt: str) -> Tokens:
        """(n, L): the prompt's tokens in turn, each row with the beginning, end and padding of a prompt of its own."""
        tokens: Tokens = {}
        for tokenizer, spec in zip(self.tokenizers, self.specs, strict=True):
            empty = tokenizer.encode("")
            added, room = tokenizer.num_special_tokens_to_add(False), self._room(tokenizer, spec)
            begin, end = empty.ids[: added - 1], empty.ids[added - 1 : added]
            found = tokenizer.encode(prompt, add_special_tokens=False)
            ids = [one for one, is_own in zip(found.ids, found.attention_mask, strict=True) if is_own]
            rows = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
            pads = empty.ids[added:]  # as many as there may be
            tokens[spec.input] = np.asarray([[*begin, *row, *end, *pads[len(row) :]] for row in rows], dtype=np.int64)
        return tokens

    def _room(self, tokenizer: Tokenizer, spec: TokenizerSpec) -> int:
        """Tokens of a prompt in one context."""
        return spec.context_length - tokenizer.num_special_tokens_to_add(False)

    def read(self, prompt: str, negative: str = "") -> Reading:
        """Both prompts as far as the model reads them; the first in known words, where it lists its words: others are mended
        within one letter, or left out."""
        reading = self._in_known_words(prompt) if self.known_words else Reading(text=prompt)
        text, kept = self._beginning(reading.text), self._beginning(negative)
        cut, cut_negative = reading.text[len(text) :].strip(), negative[len(kept) :].strip()
        return replace(reading, text=text, negative=kept, cut=cut, cut_negative=cut_negative)

    def _beginning(self, text: str) -> str:
        """As many of its words as all encoders read that do not cut by themselves."""
        for tokenizer, spec in zip(self.tokenizers, self.specs, strict=True):
            room = self._room(tokenizer, spec) * (MOST_CHUNKS if self.joins else 1)
            while len(spec.text(text).encode()) > room and tokenizer.truncation is None:  # a token is a byte at least
                found = _first_tokens(tokenizer, spec, text, room)
                if sum(found.attention_mask) <= room:
                    break
                ahead = len(spec.prefix) - spec.lowercase * (len(text) - len(text.lstrip()))
                end = max(0, min(found.offsets[room - 1][1] - ahead, len(text) - 1))
                text = text[: _end_of_word(text, end)].rstrip()
        return text

    def _in_known_words(self, prompt: str) -> Reading:
        kept, unknown, replaced = [], dict[str, None](), dict[str, str]()
        for piece in _PIECE.findall(_SELECTORS.sub("", _POSSESSIVE.sub("", prompt)).lower()):
            if piece in self.known_words:
                kept.append(piece)
            elif near := self._near(piece):
                kept.append(near)
                replaced[piece] = near
            elif piece.isalnum() or not piece.isascii():  # of the other signs nobody expects a picture
                unknown[piece] = None
        text = re.sub("( ,)+", ",", " ".join(kept)).strip(" ,")  # of what stood between commas, nothing may be left
        if not text and not unknown:  # a prompt of signs alone: somebody expects something of them
            unknown = dict.fromkeys(_PIECE.findall(prompt))
        return Reading(text=text, unknown=list(unknown), replaced=replaced)

    def nearest(self, word: str) -> list[str]:
        """Up to three known words that are spelled like it, the likeliest first."""
        return difflib.get_close_matches(word.lower(), sorted(self.known_words), n=3, cutoff=0.6)

    def _near(self, word: str) -> str | None:
        """The known word that is one letter away, the likeliest of several."""
        if len(word) < _SHORTEST or not word.isalpha():
            return None
        shortened = _without_a_letter(word) if len(word) <= self._longest + 1 else ()
        near = {known for key in (word, *shortened) for known in self._by_letters.get(key, ())}
        found = [known for known in near if one_letter_apart(word, known)]
        return min(found, key=lambda known: (known[0] != word[0], len(known) != len(word), known), default=None)

    @functools.cached_property
    def _by_letters(self) -> dict[str, list[str]]:
        """The words in which a typo is mended, each under itself and under all that is left of it without one letter: of two
        words that are a letter apart, one of these is the same."""
        found: dict[str, list[str]] = {}
        for word in self.known_words:
            if word.isalpha() and len(word) >= _SHORTEST - 1:
                for key in (word, *_without_a_letter(word)):
                    found.setdefault(key, []).append(word)
        return found

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_letters), default=0)


def _first_tokens(tokenizer: Tokenizer, spec: TokenizerSpec, text: str, count: int) -> Encoding:
    """All tokens of a text or, of a long one, of so much of its beginning that the first `count` are those of all of it: half of
    what is read is behind them. All of 32,000 letters would take some 30 ms, in which no other thread runs."""
    letters = LETTERS_READ * count
    while True:
        is_all = letters >= len(text)
        found = tokenizer.encode(
            spec.text(text if is_all else text[: _end_of_word(text, letters)]), add_special_tokens=False
        )
        if is_all or sum(found.attention_mask) > 2 * count:
            return found
        letters *= 2


def _without_a_letter(word: str) -> set[str]:
    return {word[:i] + word[i + 1 :] for i in range(len(word))}


def _end_of_word(text: str, end: int) -> int:
    """Where to cut a text of which so many letters fit: at a space if there is one in their last fifth, else at a sign there, as
    in lists of tags; else, as in Chinese, behind all of them."""
    for ends in (str.isspace, lambda letter: unicodedata.category(letter)[0] in "PS"):
        if (at := next((at for at in range(end, 4 * end // 5, -1) if ends(text[at])), None)) is not None:
            return at
    return end


def one_letter_apart(a: str, b: str) -> bool:
    """Whether one letter added, left out, or changed, or two neighbours exchanged, makes one word the other."""
    if a == b or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    if len(a) != len(b):
        return rest_a[1:] == rest_b or rest_a == rest_b[1:]
    exchanged = rest_a[:2] == rest_b[1::-1] and rest_a[2:] == rest_b[2:]
    return rest_a[1:] == rest_b[1:] or exchanged
