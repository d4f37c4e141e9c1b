"""Prompts that are longer than a CLIP's context: cut, or read in chunks whose embeddings are joined."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers

from imagine_flash.core.errors import RequestError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.tokenizer import PromptTokenizer
from imagine_flash.folders.manifests import TokenizerSpec
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.pipelines.loading import load_stages

LONG = " ".join(["a fox on a pink background to the left of a cat above a dog"] * 3)


@pytest.fixture(scope="module")
def engine(tiny_student: Path):
    with Engine.load(tiny_student, backend="torch", device="cpu", long_prompts="joined") as loaded:
        yield loaded


def test_chunks_are_encoded_apart_and_joined(engine: Engine, tiny_student: Path) -> None:
    """As A1111 and compel do: each chunk has a beginning and an end of its own, and their embeddings follow one another."""
    stages = load_stages(tiny_student)
    source = stages.tokens[0]
    ids, room = source.tokenizer(LONG, add_special_tokens=False).input_ids, source.length - 2
    rows = [ids[start : start + room] for start in range(0, len(ids), room)]
    assert len(rows) > 2 and len(rows[-1]) < room
    bos, eos, pad = (getattr(source.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    chunks = [[bos, *row, eos, *[pad] * (room - len(row))] for row in rows]
    with torch.inference_mode():
        apart = [stages.text_encoder(torch.tensor([chunk])) for chunk in chunks]
    result = engine.generate(GenerateRequest(prompt=LONG, seed=7))
    known = engine.prompt_cache.find(engine.tokenizer.encode(LONG))
    assert known is not None and result.cut == ""
    for found, *parts in zip(known, *apart, strict=True):
        expected = torch.cat(parts, dim=1) if found.ndim == 3 else parts[0]
        assert torch.allclose(found.float(), expected.float(), atol=1e-5)
    with Engine.load(tiny_student, backend="torch", device="cpu") as cutting:
        other = cutting.generate(GenerateRequest(prompt=LONG, seed=7))
    assert other.cut and not np.array_equal(other.images, result.images)


@pytest.mark.parametrize(
    ("prompt", "text", "cut"),
    [
        ("a fox, on a pink background", "a fox, on a pink", "background"),
        ("a fox,on_a,pink,background", "a fox,on_a,pink", ",background"),
        ("a fox-on-a-pink_background", "a fox-on-a-pink", "_background"),
        ("a 狐狸阳光明媚细节丰富", "a 狐狸阳光明", "媚细节丰富"),
        ("a 狐狸阳光，明媚细节丰富", "a 狐狸阳光", "，明媚细节丰富"),
        ("foxonapinkbackground", "foxonapinkbackgro", "und"),
    ],
)
def test_where_a_long_prompt_is_cut(prompt: str, text: str, cut: str) -> None:
    """At its last space, however far back: of Chinese text and lists of tags most of the context stayed unused."""
    signs = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=signs, merges=[]))  # a byte is a token
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader = PromptTokenizer([tokenizer], [TokenizerSpec(file="t.json", context_length=17)])
    found, against = reader.read(prompt), reader.read("a fox", prompt)
    assert (found.text, found.cut) == (text, cut)
    assert (against.text, against.cut, against.negative, against.cut_negative) == ("a fox", "", text, cut)
    both = reader.read(prompt, prompt)
    assert both.cut == both.cut_negative == cut


class Counting:
    """A tokenizer that counts the letters that it is given."""

    truncation = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.most = tokenizer, 0
        self.num_special_tokens_to_add = tokenizer.num_special_tokens_to_add

    def encode(self, text: str, **options: bool) -> Encoding:
        self.most = max(self.most, len(text))
        return self.tokenizer.encode(text, **options)


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize(
    "text", ["a fox on a pink background, ", "狐狸阳光明媚，细节丰富", "w", "tag,of,", "🦄 ", "a     b"]
)
def test_of_a_very_long_prompt_only_the_beginning_is_read(
    tiny_artifact: Path, text: str, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was, to find where the first few tokens end: 100 ms for 32,000 letters, in which no other thread ran."""
    (spec,) = read_artifact_manifest(tiny_artifact).tokenizers
    tokenizer = Counting(Tokenizer.from_file(str(tiny_artifact / spec.file)))
    spec = spec.model_copy(update={"known_words": []})
    reader = PromptTokenizer([tokenizer], [spec], joins=joins)  # type: ignore[list-item]
    prompt = (text * 32_000)[:32_000]
    found = reader.read(prompt, prompt)
    assert found.text and found.cut and tokenizer.most < (12_000 if joins else 4_000)
    monkeypatch.setattr("imagine_flash.engine.tokenizer.LETTERS_READ", 10**6)
    assert reader.read(prompt, prompt) == found and tokenizer.most == 32_000


def test_short_and_long_ones_at_once_are_as_alone(engine: Engine) -> None:
    requests = [GenerateRequest(prompt=prompt, seed=7) for prompt in (LONG, "a cat", LONG + " a dog", "a fox")]
    requests.append(GenerateRequest(prompt=LONG, seed=7, guidance=3, negative_prompt="a dog"))
    alone = [engine.generate(request).images for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = [result.images for result in pool.map(engine.generate, requests)]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    assert not np.array_equal(alone[0], alone[-1])


def test_there_is_an_end_and_who_cannot_join_says_so(engine: Engine, tiny_student: Path) -> None:
    assert engine.generate(GenerateRequest(prompt=LONG * 20, steps=1)).cut
    with pytest.raises(RequestError, match="joined long_prompts need a student"):
        Engine.load(long_prompts="joined")
    with pytest.raises(RequestError, match="torch-compile has networks of one context"):
        Engine.load(tiny_student, backend="torch-compile", long_prompts="joined")
    with pytest.raises(RequestError, match="long_prompts"):
        Engine.load(tiny_student, long_prompts="split")
