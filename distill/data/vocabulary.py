"""What emoji scenes can show, and every word for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One class of object. Kinds may share a noun: a caption that says "a heart" means either colour."""

    noun: str
    emoji: str
    colours: tuple[str, ...] = ()  # own colours, as an adjective may state them
    synonyms: tuple[str, ...] = ()
    plural: str = ""  # where it is not noun + "s"

    @property
    def nouns(self) -> tuple[str, ...]:
        return self.noun, *self.synonyms


KINDS: dict[str, Kind] = {
    "cat": Kind(noun="cat", emoji="🐱", colours=("yellow", "orange"), synonyms=("kitty", "kitten")),
    "dog": Kind(noun="dog", emoji="🐶", colours=("brown and white",), synonyms=("puppy", "doggy")),
    "fox": Kind(noun="fox", emoji="🦊", colours=("orange", "red"), plural="foxes"),
    "panda": Kind(noun="panda", emoji="🐼", colours=("black and white",)),
    "frog": Kind(noun="frog", emoji="🐸", colours=("green",), synonyms=("toad",)),
    "lion": Kind(noun="lion", emoji="🦁", colours=("yellow", "golden")),
    "pig": Kind(noun="pig", emoji="🐷", colours=("pink",), synonyms=("piggy", "piglet")),
    "penguin": Kind(noun="penguin", emoji="🐧", colours=("black and white",)),
    "octopus": Kind(noun="octopus", emoji="🐙", colours=("red", "pink"), plural="octopuses"),
    "fish": Kind(noun="fish", emoji="🐠", colours=("yellow",), plural="fish"),
    "butterfly": Kind(noun="butterfly", emoji="🦋", colours=("orange",), plural="butterflies"),
    "tree": Kind(noun="tree", emoji="🌳", colours=("green",), synonyms=("oak",)),
    "sunflower": Kind(noun="sunflower", emoji="🌻", colours=("yellow",), synonyms=("flower",)),
    "mushroom": Kind(noun="mushroom", emoji="🍄", colours=("red",), synonyms=("toadstool",)),
    "red apple": Kind(noun="apple", emoji="🍎", colours=("red",)),
    "banana": Kind(noun="banana", emoji="🍌", colours=("yellow",)),
    "pizza": Kind(noun="pizza", emoji="🍕"),
    "house": Kind(noun="house", emoji="🏠", synonyms=("home", "cottage")),
    "red car": Kind(noun="car", emoji="🚗", colours=("red",), synonyms=("automobile",)),
    "rocket": Kind(noun="rocket", emoji="🚀", synonyms=("spaceship", "spacecraft")),
    "sailboat": Kind(noun="sailboat", emoji="⛵", synonyms=("boat", "ship", "yacht")),
    "star": Kind(noun="star", emoji="⭐", colours=("yellow", "golden")),
    "robot": Kind(noun="robot", emoji="🤖", colours=("gray", "grey"), synonyms=("android",)),
    "ghost": Kind(noun="ghost", emoji="👻", colours=("white",), synonyms=("spirit",)),
    "green apple": Kind(noun="apple", emoji="🍏", colours=("green",)),
    "blue car": Kind(noun="car", emoji="🚙", colours=("blue",), synonyms=("automobile",)),
    "red heart": Kind(noun="heart", emoji="❤", colours=("red",)),
    "blue heart": Kind(noun="heart", emoji="💙", colours=("blue",)),
    "bear": Kind(noun="bear", emoji="🐻", colours=("brown",), synonyms=("teddy",)),
    "rabbit": Kind(noun="rabbit", emoji="🐰", colours=("gray", "grey"), synonyms=("bunny", "hare")),
    "owl": Kind(noun="owl", emoji="🦉", colours=("brown",)),
    "turtle": Kind(noun="turtle", emoji="🐢", colours=("green",), synonyms=("tortoise",)),
    "whale": Kind(noun="whale", emoji="🐳", colours=("blue",)),
    "cactus": Kind(noun="cactus", emoji="🌵", colours=("green",), plural="cactuses"),
    "strawberry": Kind(noun="strawberry", emoji="🍓", colours=("red",), plural="strawberries", synonyms=("berry",)),
    "snowman": Kind(noun="snowman", emoji="⛄", colours=("white",), plural="snowmen"),
}
OBJECT_NAMES = tuple(KINDS)

# hue in degrees, then the ranges of saturation and value from which the shade is drawn
BACKGROUNDS: dict[str, tuple[float, tuple[float, float], tuple[float, float]]] = {
    "red": (0, (0.75, 0.90), (0.66, 0.85)),
    "orange": (27, (0.75, 0.95), (0.90, 1.00)),
    "yellow": (52, (0.55, 0.85), (0.92, 1.00)),
    "green": (125, (0.45, 0.75), (0.50, 0.85)),
    "blue": (215, (0.50, 0.80), (0.65, 1.00)),
    "purple": (275, (0.50, 0.75), (0.50, 0.80)),
    "pink": (335, (0.25, 0.42), (0.95, 1.00)),
    "gray": (0, (0.00, 0.04), (0.45, 0.80)),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
BACKGROUND_SYNONYMS = {"gray": ("gray", "grey"), "purple": ("purple", "violet")}

# pattern -> as an adjective, as a noun after "with"
PATTERNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": (("plain", "solid"), ()),
    "gradient": (("gradient", "shaded"), ("a gradient",)),
    "stripes": (("striped",), ("stripes",)),
    "checks": (("checkered", "checked"), ("checks",)),
    "dots": (("dotted", "polka dot", "spotted"), ("dots", "polka dots")),
}
PATTERN_NAMES = tuple(PATTERNS)

AXES = ("horizontal", "vertical")
# phrase between two nouns -> (axis, the first-named object comes first on it); None: the phrase does not say
RELATIONS: dict[str, tuple[str, bool | None]] = {
    "to the left of": ("horizontal", True),
    "left of": ("horizontal", True),
    "on the left of": ("horizontal", True),
    "to the right of": ("horizontal", False),
    "right of": ("horizontal", False),
    "on the right of": ("horizontal", False),
    "above": ("vertical", True),
    "over": ("vertical", True),
    "on top of": ("vertical", True),
    "below": ("vertical", False),
    "under": ("vertical", False),
    "beneath": ("vertical", False),
    "underneath": ("vertical", False),
    "next to": ("horizontal", None),
    "beside": ("horizontal", None),
}

OPENINGS = (
    "a picture of",
    "a photo of",
    "an image of",
    "a drawing of",
    "a painting of",
    "an emoji of",
    "draw",
    "show me",
    "paint",
    "please draw",
    "can you draw",
    "i want",
    "there is",
    "here is",
    "create",
    "generate",
    "a scene with",
    "this is",
)
ADJECTIVES = ("cute", "happy", "little", "lovely", "beautiful", "funny", "nice", "pretty", "sweet", "cool", "smiling")
ENDINGS = ("please", "for me", "in high quality", "emoji", "sticker", "icon", "thank you")


def plural(noun: str) -> str:
    """The plural of a kind's noun or synonym."""
    known = {kind.noun: kind.plural for kind in KINDS.values() if kind.plural}
    if noun in known:
        return known[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


@functools.cache
def same_noun(name: str) -> tuple[str, ...]:
    """The kinds that share the noun of kind `name`, itself among them."""
    return tuple(other for other, kind in KINDS.items() if kind.noun == KINDS[name].noun)


def vocabulary() -> dict[str, list[str]]:
    """What may be asked for, in groups: each an example's plain words, most useful first."""
    objects = dict.fromkeys(kind.noun for kind in KINDS.values())
    coloured = [name for name in KINDS if " " in name]
    return {
        "objects": sorted(objects),
        "coloured objects": sorted(coloured),
        "backgrounds": list(BACKGROUND_NAMES),
        "patterns": [forms[0][0] for forms in PATTERNS.values()],
        "relations": ["to the left of", "to the right of", "above", "below", "next to", "and"],
        "counts": ["one", "two"],
        "emoji": [kind.emoji for kind in KINDS.values()],
    }


def synonyms() -> dict[str, str]:
    """Every other word for an object, a colour or a pattern -> the word of `vocabulary`."""
    pairs = [(other, kind.noun) for kind in KINDS.values() for other in kind.synonyms]
    pairs += [(other, name) for name, others in BACKGROUND_SYNONYMS.items() for other in others if other != name]
    pairs += [(other, forms[0][0]) for forms in PATTERNS.values() for other in forms[0][1:]]
    return dict(pairs)


@functools.cache
def all_words() -> list[str]:
    """Every word that a caption can hold, and the emoji, sorted."""
    phrases = [
        *RELATIONS,
        *OPENINGS,
        *ADJECTIVES,
        *ENDINGS,
        "side by side",
        "one the other another",
        "a pair of",
        "two 2 1",
    ]
    phrases += ["a an and on in with of the background in front of , left right"]
    for kind in KINDS.values():
        phrases += [kind.emoji, *kind.nouns, *map(plural, kind.nouns), *kind.colours]
    phrases += [*BACKGROUND_NAMES, *(word for others in BACKGROUND_SYNONYMS.values() for word in others)]
    phrases += [form for forms in PATTERNS.values() for group in forms for form in group]
    return sorted({word for phrase in phrases for word in phrase.split()})
