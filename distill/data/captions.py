"""Captions of emoji scenes: what a person might type for a picture, and which of its attributes that states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .vocabulary import (
    ADJECTIVES,
    BACKGROUND_SYNONYMS,
    ENDINGS,
    KINDS,
    OPENINGS,
    PATTERNS,
    RELATIONS,
    plural,
    same_noun,
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is in a picture: one object, or two in the order of their axis (left before right, top before bottom)."""

    objects: tuple[str, ...]
    axis: str | None
    background: str
    pattern: str


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and what it states of its scene.

    objects: for each object of the scene, the kinds that the caption's words allow ("a heart": either colour).
    states_axis, states_order: "next to" states the axis alone, "left of" the order too.
    """

    text: str
    objects: tuple[tuple[str, ...], ...]
    states_axis: bool
    states_order: bool
    states_background: bool
    states_pattern: bool


def chance(rng: np.random.Generator, share: float) -> bool:
    return bool(rng.random() < share)


def pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[rng.integers(len(options))]


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True, kw_only=True)
class _Style:
    """What one caption keeps to: all its nouns with or without articles, as words or as emoji."""

    bare: bool
    emoji: bool
    adjectives: float


def describe(scene: Scene, rng: np.random.Generator, *, strange_words: float = 0.1) -> Caption:
    """Say what is in a scene, in one of very many ways; the colours, the pattern or the side may be left out.

    strange_words: the share of captions with words dropped in that mean nothing here, so that unknown words do no harm.
    """
    style = _Style(bare=chance(rng, 0.25), emoji=chance(rng, 0.08), adjectives=0.06 if chance(rng, 0.5) else 0.0)
    if scene.axis is None:
        text, objects, axis, order = *_one(scene.objects[0], style, rng), False, False
    elif scene.objects[0] == scene.objects[1]:
        text, objects, axis, order = _twins(scene, style, rng)
    else:
        text, objects, axis, order = _pair(scene, style, rng)
    text, background, pattern = _placed(text, scene, rng)
    return Caption(
        text=_spoken(text, rng, strange_words),
        objects=objects,
        states_axis=axis,
        states_order=order,
        states_background=background,
        states_pattern=pattern,
    )


def describe_with_patterns(scene: Scene, rng: np.random.Generator, share: float) -> Caption:
    """The same, with the background's pattern stated in `share` of the captions, and in some of the others too: by itself a caption
    says it once in four times, which is so rare that a network learns everything else first."""
    wanted, caption = chance(rng, share), describe(scene, rng)
    while wanted and not caption.states_pattern:
        caption = describe(scene, rng)
    return caption


def _noun(name: str, style: _Style, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A noun with its adjectives, and the kinds that it can mean."""
    kind, kinds = KINDS[name], same_noun(name)
    if style.emoji:
        return kind.emoji, (name,)
    noun = pick(rng, kind.synonyms) if kind.synonyms and chance(rng, 0.3) else kind.noun
    if kind.colours and chance(rng, 0.5 if len(kinds) > 1 else 0.2):
        noun, kinds = f"{pick(rng, kind.colours)} {noun}", (name,)
    if chance(rng, style.adjectives):
        noun = f"{pick(rng, ADJECTIVES)} {noun}"
    return noun, kinds


def _phrase(name: str, style: _Style, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    noun, kinds = _noun(name, style, rng)
    if style.bare or style.emoji:
        return noun, kinds
    return (f"{pick(rng, ('one', 'the', '1'))} {noun}" if chance(rng, 0.08) else with_article(noun)), kinds


def _one(name: str, style: _Style, rng: np.random.Generator) -> tuple[str, tuple[tuple[str, ...], ...]]:
    text, kinds = _phrase(name, style, rng)
    return text, (kinds,)


def _twins(
    scene: Scene, style: _Style, rng: np.random.Generator
) -> tuple[str, tuple[tuple[str, ...], ...], bool, bool]:
    noun, kinds = _noun(scene.objects[0], style, rng)
    if style.emoji:
        text = pick(rng, (f"{noun}{noun}", f"two {noun}", f"{noun} {noun}"))
    else:
        *adjectives, last = noun.split()
        many = " ".join([*adjectives, plural(last)])
        text = pick(rng, (f"two {many}", f"two {many}", f"2 {many}", f"a pair of {many}", many, f"{noun} and {noun}"))
    states_axis = chance(rng, 0.4)
    if states_axis:
        beside, stacked = (" side by side", " next to one another"), (" on top of one another", ", one above the other")
        text += pick(rng, beside if scene.axis == "horizontal" else stacked)
    return text, (kinds, kinds), states_axis, False


def _pair(scene: Scene, style: _Style, rng: np.random.Generator) -> tuple[str, tuple[tuple[str, ...], ...], bool, bool]:
    named = [_phrase(name, style, rng) for name in scene.objects]
    (first, second), objects = (n[0] for n in named), tuple(n[1] for n in named)
    if not chance(rng, 0.85):
        one, other = (first, second) if chance(rng, 0.5) else (second, first)
        if style.emoji and chance(rng, 0.5):
            return f"{one}{other}", objects, False, False
        return (
            pick(rng, (f"{one} and {other}", f"{one} and {other}", f"{one} with {other}", f"{one}, {other}")),
            objects,
            False,
            False,
        )
    if scene.axis == "horizontal" and chance(rng, 0.08):
        left, right = f"{first} on the left", f"{second} on the right"
        return pick(rng, (f"{left} and {right}", f"{right}, {left}")), objects, True, True
    phrase = pick(rng, [p for p, (axis, _) in RELATIONS.items() if axis == scene.axis])
    forward = RELATIONS[phrase][1]
    states_order = forward is not None
    if forward is None:
        forward = chance(rng, 0.5)
    one, other = (first, second) if forward else (second, first)
    return f"{one} {phrase} {other}", objects, True, states_order


def _placed(text: str, scene: Scene, rng: np.random.Generator) -> tuple[str, bool, bool]:
    """The text with what it says of the background: (text, states its colour, states its pattern)."""
    says_colour, says_pattern = chance(rng, 0.7), chance(rng, 0.25)
    if not (says_colour or says_pattern):
        return text, False, False
    colour = pick(rng, BACKGROUND_SYNONYMS.get(scene.background, (scene.background,))) if says_colour else ""
    adjectives, nouns = PATTERNS[scene.pattern]
    after = f" with {pick(rng, nouns)}" if says_pattern and nouns and chance(rng, 0.3) else ""
    before = pick(rng, adjectives) if says_pattern and not after else ""
    words = [before, colour] if chance(rng, 0.75) else [colour, before]
    background = " ".join([*filter(None, words), "background"]) + after
    if not says_pattern and chance(rng, 0.25):
        return f"{text} on {colour}", True, False
    forms = (
        "{t} on {a}",
        "{t} on {a}",
        "{t} on {a}",
        "{t}, {b}",
        "{t} in front of {a}",
        "{t} with {a}",
        "on {a}, {t}",
        "{b}, {t}",
        "{a} with {t}",
    )
    return pick(rng, forms).format(t=text, a=with_article(background), b=background), says_colour, says_pattern


def _spoken(text: str, rng: np.random.Generator, strange_words: float) -> str:
    """What people put around it: "draw ... please", and now and then a word that means nothing here."""
    if chance(rng, 0.12):
        text = f"{pick(rng, OPENINGS)} {text}"
    if chance(rng, 0.06):
        text = f"{text} {pick(rng, ENDINGS)}"
    if chance(rng, strange_words):
        words = text.split(" ")
        for _ in range(1 + chance(rng, 0.3)):
            letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(3, 9))
            words.insert(rng.integers(len(words) + 1), "".join(map(chr, letters)))
        text = " ".join(words)
    return text
