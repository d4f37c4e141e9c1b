"""Scenes are deterministic, captions are true, and the held-out combinations stay held out."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.data import captions, emoji, vocabulary
from imagine_flash.distill.data.prompts import emoji_prompts, general_prompts, read_prompts


@pytest.fixture(scope="module")
def scenes() -> emoji.EmojiScenes:
    try:
        return emoji.EmojiScenes(seed=3)
    except ImagineFlashError as error:
        pytest.skip(str(error))


def test_enough_to_say() -> None:
    assert len(vocabulary.KINDS) >= 32 and len(vocabulary.BACKGROUNDS) >= 8 and len(vocabulary.PATTERNS) >= 4
    assert len({kind.emoji for kind in vocabulary.KINDS.values()}) == len(vocabulary.KINDS)
    assert {"kitty", "puppy", "spaceship"} <= set(vocabulary.synonyms())
    assert [vocabulary.plural(n) for n in ("cat", "fox", "butterfly", "fish", "boat", "puppy", "snowman")] == [
        "cats",
        "foxes",
        "butterflies",
        "fish",
        "boats",
        "puppies",
        "snowmen",
    ]


def test_a_scene_depends_on_seed_and_index_alone(scenes: emoji.EmojiScenes) -> None:
    again = emoji.EmojiScenes(seed=3)
    other = emoji.EmojiScenes(seed=4)
    for index in (0, 1, 997):
        assert np.array_equal(scenes[index].image, again[index].image)
        assert scenes[index].caption == again[index].caption == emoji.caption_at(3, index)[1]
    assert any(not np.array_equal(scenes[i].image, other[i].image) for i in range(3))


def test_the_stream_is_the_index(scenes: emoji.EmojiScenes) -> None:
    for index, example in enumerate(itertools.islice(scenes, 5)):
        assert np.array_equal(example.image, scenes[index].image)
        assert example.image.shape == (64, 64, 3) and example.image.dtype == np.uint8


def test_training_never_shows_a_held_out_combination() -> None:
    held_out = emoji.held_out_combinations()
    assert 100 < len(held_out) < 300
    for index in range(3000):
        scene = emoji.caption_at(1, index)[0]
        if scene.axis:
            assert (scene.objects[0], scene.axis, scene.objects[1]) not in held_out
        first, second = (emoji.caption_at(1, index, held_out=True)[0].objects * 2)[:2]
        assert (first, emoji.caption_at(1, index, held_out=True)[0].axis, second) in held_out


def _meant(text: str) -> list[set[str]]:
    """The kinds that each noun of a caption can mean, in the caption's order: written anew, not by the code under test."""
    nouns: dict[str, set[str]] = {}
    for name, kind in vocabulary.KINDS.items():
        for noun in (*kind.nouns, *map(vocabulary.plural, kind.nouns), kind.emoji):
            nouns.setdefault(noun, set()).add(name)
    text = text.replace("polka dot", "polka-dot").replace(",", " ,")
    for emoji_of in (kind.emoji for kind in vocabulary.KINDS.values()):
        text = text.replace(emoji_of, f" {emoji_of} ")
    words = text.split()
    found = []
    for i, word in enumerate(words):
        if word in nouns and "background" not in words[i + 1 : i + 2]:
            before = set(words[i - 1 : i])
            coloured = {n for n in nouns[word] if " " in n and n.split()[0] in before}
            found.append(coloured or nouns[word])
    return found


def test_a_caption_says_what_is_true_and_only_that() -> None:
    for index in range(4000):
        scene, caption, _ = emoji.caption_at(5, index, strange_words=0)
        words = caption.text.replace(",", " ").split()
        assert all(name in allowed for name, allowed in zip(scene.objects, caption.objects, strict=True))
        colours = {scene.background, *vocabulary.BACKGROUND_SYNONYMS.get(scene.background, ())}
        if caption.states_background:
            assert colours & set(words)
        stated = [
            w
            for forms in vocabulary.PATTERNS.values()
            for group in forms
            for w in group
            if f" {w} " in f" {caption.text} ".replace(",", " ")
        ]
        adjectives, nouns = vocabulary.PATTERNS[scene.pattern]
        assert caption.states_pattern == bool(stated) and set(stated) <= {*adjectives, *nouns}
        nouns_said = _meant(caption.text)
        assert len(nouns_said) in (1, 2), caption.text
        if scene.axis and len(nouns_said) == 2:
            assert all(any(name in said for said in nouns_said) for name in scene.objects), caption.text
        phrases = [p for p in vocabulary.RELATIONS if f" {p} " in caption.text]
        if caption.states_axis and scene.objects[0] != scene.objects[1] and phrases:
            axis, forward = vocabulary.RELATIONS[max(phrases, key=len)]
            assert axis == scene.axis and caption.states_order == (forward is not None)
            if forward is not None:
                first = scene.objects[0] if forward else scene.objects[1]
                assert first in nouns_said[0], caption.text


def test_one_noun_may_mean_two_kinds() -> None:
    scene = captions.Scene(objects=("red heart",), axis=None, background="blue", pattern="plain")
    said = [captions.describe(scene, np.random.default_rng(i), strange_words=0) for i in range(200)]
    assert {("red heart",), ("red heart", "blue heart")} == {c.objects[0] for c in said}
    for caption in said:
        bound = "red heart" in caption.text or "red " in caption.text or "❤" in caption.text
        assert bound == (caption.objects[0] == ("red heart",)), caption.text


def test_strange_words_leave_the_known_ones() -> None:
    known = set(vocabulary.all_words())
    strange = 0
    for index in range(500):
        scene = emoji.scene_at(3, index)
        plain = captions.describe(scene, np.random.default_rng(index), strange_words=0)
        noisy = captions.describe(scene, np.random.default_rng(index), strange_words=1)
        left = [w for w in noisy.text.split() if w.strip(",") in known or not w.strip(",").isalpha()]
        assert [w for w in left if w in plain.text.split()] == [w for w in plain.text.split() if w in left]
        strange += noisy.text != plain.text
    assert strange == 500


def test_every_word_is_listed() -> None:
    known = set(vocabulary.all_words())
    emoji_signs = {kind.emoji for kind in vocabulary.KINDS.values()}
    for index in range(3000):
        text = emoji.caption_at(7, index, strange_words=0)[1].text
        for sign in emoji_signs:
            text = text.replace(sign, f" {sign} ")
        assert set(text.replace(",", " , ").split()) <= known, text


def test_objects_are_where_the_relation_says(scenes: emoji.EmojiScenes) -> None:
    rng = np.random.default_rng(0)
    for axis, coordinate in (("horizontal", 0), ("vertical", 1)):
        scene = captions.Scene(objects=("cat", "dog"), axis=axis, background="red", pattern="plain")
        for _ in range(50):
            first, second = scenes.renderer._places(scene, rng)
            assert second[coordinate] - first[coordinate] >= 20
            assert all(0 <= place[i] <= 64 for place in (first, second) for i in (0, 1))


@pytest.mark.parametrize("font", ["nowhere.ttf", __file__])
def test_no_font_is_one_clear_line(font: str) -> None:
    with pytest.raises(ImagineFlashError, match="font") as error:
        emoji.EmojiScenes(seed=0, font=font)
    assert "\n" not in str(error.value)


def test_prompts_from_a_file(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dog"]
    path.write_text(
        "a cat\na dog", encoding="utf-8-sig"
    )  # a byte order mark, as Windows writes it, was in the first prompt
    assert read_prompts(path) == ["a cat", "a dog"]
    path.write_text("\n", encoding="utf-8")
    for bad in (path, tmp_path / "none.txt"):
        with pytest.raises(ImagineFlashError, match=r"one a line|one prompt a line"):
            read_prompts(bad)


def test_the_prompts_that_the_package_brings() -> None:
    found = read_prompts(Path("general"))
    assert len(set(found)) == len(found) == 2000 and found == general_prompts(2000)
    assert not [prompt for prompt in found if re.search(r"[{}]|  |\ba [aeiou]|\ban [^aeiou]", prompt)]
    words = Counter(word for prompt in found for word in set(prompt.split()))
    assert len(words) > 350 and words.most_common(4)[3][1] < 700  # no word but articles and prepositions everywhere


def test_patterns_are_stated_as_often_as_a_recipe_asks() -> None:
    """Half of the captions, and a quarter of the others, say the pattern; all of them say it of their own scene."""
    rng, words = np.random.default_rng(1), {pattern: {*a, *n} for pattern, (a, n) in vocabulary.PATTERNS.items()}
    told = [
        (scene, captions.describe_with_patterns(scene, rng, 0.5))
        for scene in (emoji.scene_at(3, i) for i in range(1000))
    ]
    assert 0.58 < np.mean([caption.states_pattern for _, caption in told]) < 0.67
    for scene, caption in told:
        if caption.states_pattern:
            assert any(word in caption.text for word in words[scene.pattern]), caption.text
    assert emoji_prompts(20, 3) == [emoji.caption_at(3, i)[1].text for i in range(20)]
    often = emoji_prompts(400, 3, 1.0)
    assert often[:20] == emoji_prompts(20, 3, 1.0)
    assert all(any(w in text for w in words[emoji.scene_at(3, i).pattern]) for i, text in enumerate(often))
