"""The runtime's tokenizers read a prompt as the pipeline's own do, whatever stands in it."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import GemmaTokenizer

from imagine_flash.engine.tokenizer import PromptTokenizer
from imagine_flash.export.tokenizer import parity_prompts, whole_words
from imagine_flash.pipelines.stages import TokenInput
from imagine_flash.pipelines.tokenizer import copy_of, tokenizers_of
from imagine_flash.tests.architectures import build_t5_tokenizer

PREFIX, LENGTH = "Enhance:\n- User Prompt: ", 64


@pytest.fixture(scope="module")
def gemma() -> TokenInput:
    """As SANA's: an instruction of several lines before the prompt, and a line break that is an added token."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "▁", *map(chr, range(32, 127))]
    tokenizer: Any = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], padding_side="right")
    tokenizer.add_tokens([AddedToken("\n", normalized=False, special=False)])
    return TokenInput("input_ids", tokenizer, LENGTH, "attention_mask", lowercase=True, prefix=PREFIX)


@pytest.fixture(scope="module")
def reader(gemma: TokenInput) -> PromptTokenizer:
    stages: Any = SimpleNamespace(tokens=[gemma])
    ((spec, tokenizer),) = tokenizers_of(stages, [])
    return PromptTokenizer([tokenizer], [spec])


@pytest.mark.parametrize("prompt", ["", "a cat", " A Cat ", "a cat\na dog", "\n a cat\n\nA dog \n"])
def test_the_instruction_stands_before_the_whole_prompt(
    gemma: TokenInput, reader: PromptTokenizer, prompt: str
) -> None:
    """It was repeated at every line break, which soon filled the context."""
    expected, found = gemma.encode([prompt]), reader.encode(prompt)
    assert {name: ids.tolist() for name, ids in found.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.mark.parametrize("start", ["", "   "])
def test_a_long_prompt_is_cut_behind_its_last_word_that_fits(reader: PromptTokenizer, start: str) -> None:
    prompt = start + "a cat on a mat\nin the style of Monet, golden hour, of 1890"
    reading = reader.read(prompt)
    assert reading.text == start + "a cat on a mat\nin the style of Monet," and reading.cut == "golden hour, of 1890"
    assert 55 < int(reader.encode(reading.text)["attention_mask"].sum()) <= LENGTH


def test_prompts_of_the_check_are_words_that_fill_the_context() -> None:
    """Of a vocabulary without CLIP's ends of words there was only "a"."""
    tokenizer = build_t5_tokenizer()
    tokens = TokenInput("input_ids", tokenizer, 30, "attention_mask", lowercase=True)
    assert {"fox", "pink"} <= set(whole_words(copy_of(tokens)))
    stages: Any = SimpleNamespace(tokens=[tokens])
    prompts = parity_prompts(stages)
    assert [len(tokenizer(prompt).input_ids) for prompt in prompts] == [2, 30, 9]
    assert len(set(" ".join(prompts).split())) > 10
