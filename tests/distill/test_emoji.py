"""Scenes are deterministic, captions are true, and the held-out combinations stay held out."""

import itertools

import numpy as np
import pytest

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.data import emoji
from imagine_flash.distill.data.prompts import emoji_prompts, read_prompts


@pytest.fixture(scope="module")
def scenes() -> emoji.EmojiScenes:
    try:
        return emoji.EmojiScenes(seed=3)
    except ImagineFlashError as error:
        pytest.skip(str(error))


def test_enough_to_say() -> None:
    assert len(emoji.OBJECTS) >= 24 and len(emoji.BACKGROUNDS) >= 8 and len(emoji.RELATIONS) >= 4


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
    assert 50 < len(held_out) < 200
    for index in range(3000):
        scene = emoji.caption_at(1, index)[0]
        if scene.axis:
            assert (scene.objects[0], scene.axis, scene.objects[1]) not in held_out
        first, second = (emoji.caption_at(1, index, held_out=True)[0].objects * 2)[:2]
        assert (first, emoji.caption_at(1, index, held_out=True)[0].axis, second) in held_out


def test_a_caption_says_what_is_true_and_only_that() -> None:
    for index in range(2000):
        scene, caption, _ = emoji.caption_at(5, index)
        words = caption.text.replace(",", " ").split()
        assert all(name in words for name in scene.objects)
        assert caption.states_background == (scene.background in words)
        found = [r for r in emoji.RELATIONS if r in words or (r == "below" and "under" in words)]
        assert caption.states_axis == bool(found)
        if found:
            axis, forward = emoji.RELATIONS[found[0]]
            named_first = min(scene.objects, key=words.index)
            assert axis == scene.axis and (named_first == scene.objects[0]) == forward


def test_every_word_is_listed() -> None:
    known = set(emoji.all_words())
    for text in emoji_prompts(2000, 7):
        assert set(text.replace(",", " ,").split()) <= known, text


def test_objects_are_where_the_relation_says(scenes: emoji.EmojiScenes) -> None:
    rng = np.random.default_rng(0)
    for axis, coordinate in (("horizontal", 0), ("vertical", 1)):
        scene = emoji.Scene(objects=("cat", "dog"), axis=axis, background="red")
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
    path.write_text("\n", encoding="utf-8")
    for bad in (path, tmp_path / "none.txt"):
        with pytest.raises(ImagineFlashError, match=r"one a line|one prompt a line"):
            read_prompts(bad)
