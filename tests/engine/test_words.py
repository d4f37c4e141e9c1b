"""What a model with a known vocabulary makes of a prompt: typos are mended, strangers left out, both are said."""

import itertools

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.engine import Engine, GenerateRequest, tokenizer
from imagine_flash.engine.session import Session
from imagine_flash.engine.tokenizer import PromptTokenizer, one_letter_apart
from imagine_flash.folders.manifests import TokenizerSpec

WORDS = [
    "a",
    "an",
    "cat",
    "cats",
    "dog",
    "fox",
    "kitty",
    "penguin",
    "on",
    "pink",
    "background",
    "and",
    ",",
    "2",
    "🐱",
    "❤",
    "left",
    "of",
]


def reader(words: list[str] = WORDS) -> PromptTokenizer:
    return PromptTokenizer(
        [Tokenizer(models.BPE())], [TokenizerSpec(file="t.json", context_length=8, known_words=words)]
    )


@pytest.mark.parametrize(
    ("prompt", "text", "unknown", "replaced"),
    [
        ("A Cat", "a cat", [], {}),
        ("a pengiun on pnik", "a penguin on pink", [], {"pengiun": "penguin", "pnik": "pink"}),
        ("a penguinn, backgroud", "a penguin, background", [], {"penguinn": "penguin", "backgroud": "background"}),
        ("a zebra and a fox", "a and a fox", ["zebra"], {}),
        ("a cot", "a", ["cot"], {}),  # three letters are near to too much
        ("2 cats!", "2 cats", [], {}),
        ("the cat's fox", "cat fox", ["the"], {}),
        ("the cat’s fox", "cat fox", ["the"], {}),
        ("🐱❤️ on pink", "🐱 ❤ on pink", [], {}),
        ("a 🦄 on pink", "a on pink", ["🦄"], {}),
        ("7 cats", "cats", ["7"], {}),
        ("kitty,fox", "kitty, fox", [], {}),
        ("a fox, zebra, on pink,", "a fox, on pink", ["zebra"], {}),
        ("???", "", ["?"], {}),  # nothing else is said: the picture has nothing to do with them
        ("...!", "", [".", "!"], {}),
        ("🦄🎈", "", ["🦄", "🎈"], {}),
        ("", "", [], {}),
    ],
)
def test_reading(prompt: str, text: str, unknown: list[str], replaced: dict[str, str]) -> None:
    found = reader().read(prompt)
    assert (found.text, found.unknown, found.replaced) == (text, unknown, replaced)


def test_many_strangers_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was compared with every known word: 0.4 s for a prompt of 32,000 letters, in which a server did nothing else."""
    compared: list[str] = []
    monkeypatch.setattr(tokenizer, "one_letter_apart", lambda a, b: compared.append(a) or one_letter_apart(a, b))
    strangers = ["".join(letters) for letters in itertools.product("vwxyz", repeat=4)]
    found = reader().read(" ".join([*strangers, "w" * 9999, "pengiun"]))
    assert len(found.unknown) == len(strangers) + 1 and found.replaced == {"pengiun": "penguin"}
    assert compared == ["pengiun"]


def test_the_nearest_known_words_are_named() -> None:
    assert reader().nearest("Kat") == ["cat"] and reader().nearest("foxes") == ["fox"]
    assert reader().nearest("zebra") == [] and reader([]).nearest("cat") == []


def test_a_model_that_knows_every_word_gets_the_prompt_as_it_is() -> None:
    found = reader([]).read("A  Zebra's “photo” 🦄!")
    assert (found.text, found.unknown, found.replaced) == ("A  Zebra's “photo” 🦄!", [], {})


@pytest.mark.parametrize(
    ("a", "b", "near"),
    [
        ("cat", "cat", False),
        ("cat", "cats", True),
        ("cats", "cat", True),
        ("cat", "cut", True),
        ("cat", "act", True),
        ("cat", "cta", True),
        ("cat", "tac", False),
        ("cat", "catch", False),
        ("abcd", "badc", False),
        ("", "a", True),
    ],
)
def test_one_letter_apart(a: str, b: str, near: bool) -> None:
    assert one_letter_apart(a, b) is near and one_letter_apart(b, a) is near


def test_a_typo_is_the_word(tiny_artifact) -> None:
    with Engine.load(tiny_artifact) as engine:
        right = engine.generate(GenerateRequest(prompt="a rocket", seed=3))
        typo = engine.generate(GenerateRequest(prompt="a rockett", seed=3))
        assert typo.replaced_words == {"rockett": "rocket"} and typo.cached and not typo.unknown_words
        assert (typo.images == right.images).all()


def test_what_a_notebook_shows_is_one_short_line(tiny_artifact) -> None:
    asked = GenerateRequest(prompt="a cat " * 50, image=np.zeros((64, 64, 3), np.uint8))
    schedule = NoiseSchedule.from_scheduler_config({"beta_schedule": "linear"})
    with Engine.load(tiny_artifact) as engine:
        session = Session(engine, lambda _: None)
        for one in (engine, asked, engine.prepare(asked), session, schedule):
            assert len(repr(one)) < 400 and "\n" not in repr(one), repr(one)
        session.close()
    assert "prompt='a cat" in repr(asked) and "image=(64, 64, 3)" in repr(asked) and "mask" not in repr(asked)


def test_a_result_is_saved_and_says_what_drew_it(tiny_artifact, tmp_path) -> None:
    with Engine.load(tiny_artifact) as engine:
        result = engine.generate(GenerateRequest(prompt="a rocket", seed=3, steps=1, count=2))
    assert repr(result).startswith("<GenerateResult 2 x 64x64, 1 steps, seed 3, ") and len(repr(result)) < 80
    paths = result.save(tmp_path / "rocket.png")
    assert [path.name for path in paths] == ["rocket-1.png", "rocket-2.png"]
    with Image.open(paths[1]) as image:
        assert (
            image.info["parameters"] == "a rocket\nSteps: 1, Seed: 4" and (np.asarray(image) == result.images[1]).all()
        )
    with pytest.raises(ImagineFlashError, match=r"cannot write 'rocket.bmp': its ending must be one of .png"):
        result.save(tmp_path / "rocket.bmp")
