"""The tokenizer gives each word of the captions one token and survives saving."""

from imagine_flash.distill.data.prompts import emoji_prompts
from imagine_flash.distill.data.vocabulary import all_words
from imagine_flash.distill.tokenizer import END, START, train_tokenizer


def test_one_token_a_word_and_letters_for_the_rest(tmp_path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = train_tokenizer(emoji_prompts(3000, 0) + all_words() * 3, context=32)
    for word in all_words():
        assert len(tokenizer.tokenize(word)) == 1, word
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer.tokenize("A  Cat") == ["a</w>", "cat</w>"]
    tokenizer.save_pretrained(str(tmp_path))
    again = CLIPTokenizer.from_pretrained(str(tmp_path))
    text = "a fox, pink background"
    ids = again(text, padding="max_length", max_length=32).input_ids
    assert ids == tokenizer(text, padding="max_length", max_length=32).input_ids and len(ids) == 32
    assert again.convert_ids_to_tokens([ids[0], ids[-1]]) == [START, END]


def test_the_same_captions_give_the_same_tokens() -> None:
    """Letters that end a word were numbered as a hash table yielded them, and merges of one frequency followed: a killed
    training was then refused as one of another recipe."""
    captions = emoji_prompts(500, 0) + all_words() * 3
    assert len({tuple(sorted(train_tokenizer(captions, context=32).get_vocab().items())) for _ in range(4)}) == 1
