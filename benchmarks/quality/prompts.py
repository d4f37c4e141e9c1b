"""The prompts of an evaluation, and what pictures keep of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np

from ...distill.data.captions import Caption, Scene
from ...distill.data.emoji import caption_at, held_out_combinations
from ...distill.reproducible import fingerprint

SPLITS = {"validation": 303, "test": 404}  # choices are made on the first; the second is read once per committed model
NOISE_SEEDS = {"validation": 3_000_000, "test": 4_000_000}
ATTRIBUTES = ("object", "relation", "background", "pattern")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Captions with the scenes that they describe and the seed of each picture's noise; index: where in the stream."""

    captions: list[Caption]
    scenes: list[Scene]
    seeds: list[int]
    index: list[int]
    split: str
    held_out: bool

    @property
    def texts(self) -> list[str]:
        return [caption.text for caption in self.captions]

    @property
    def digest(self) -> str:
        """Of what the pictures depend on beside the model."""
        return fingerprint(self.texts, self.seeds)

    def __getitem__(self, rows: slice) -> Prompts:
        return replace(
            self, captions=self.captions[rows], scenes=self.scenes[rows], seeds=self.seeds[rows], index=self.index[rows]
        )

    def __len__(self) -> int:
        return len(self.seeds)


def draw_prompts(count: int, *, split: str, held_out: bool) -> Prompts:
    """`count` captions with noise of their own. Held-out ones state the order, since composition is their point, and describe
    nothing that training shows: "an apple" may be either of two kinds, and with both the combination is a held-out one."""
    found, index = [], 0
    while len(found) < count:
        scene, caption, _ = caption_at(SPLITS[split], index, held_out=held_out)
        if not held_out or (caption.states_order and _is_new(caption, scene)):
            found.append((caption, scene, index))
        index += 1
    first = NOISE_SEEDS[split] + (500_000 if held_out else 0)
    captions, scenes, indices = (list(column) for column in zip(*found, strict=True))
    return Prompts(
        captions=captions,
        scenes=scenes,
        seeds=list(range(first, first + count)),
        index=indices,
        split=split,
        held_out=held_out,
    )


def _is_new(caption: Caption, scene: Scene) -> bool:
    first, second = caption.objects
    return all((a, scene.axis, b) in held_out_combinations() for a, b in product(first, second))


def kept(caption: Caption, wanted: Scene, found: Scene) -> dict[str, bool]:
    """Which of the attributes that a caption states its picture shows; what it leaves to chance does not count.

    A relation is right if the axis is, and, where the order is stated, the objects stand in it: with others there is no order.
    """
    matches = [
        order
        for order in permutations(range(len(found.objects)))
        if len(found.objects) == len(caption.objects)
        and all(found.objects[i] in allowed for i, allowed in zip(order, caption.objects, strict=True))
    ]
    stated = {"object": bool(matches)}
    if caption.states_axis:
        in_order = tuple(range(len(found.objects))) in matches
        stated["relation"] = wanted.axis == found.axis and (in_order or not caption.states_order)
    if caption.states_background:
        stated["background"] = wanted.background == found.background
    if caption.states_pattern:
        stated["pattern"] = wanted.pattern == found.pattern
    return stated


def marks(prompts: Prompts, found: list[Scene]) -> np.ndarray:
    """(N, 5) int8: 1 right, 0 wrong, -1 not stated; the columns are ATTRIBUTES and "all"."""
    rows = []
    for caption, wanted, seen in zip(prompts.captions, prompts.scenes, found, strict=True):
        stated = kept(caption, wanted, seen)
        rows.append([int(stated[name]) if name in stated else -1 for name in ATTRIBUTES] + [int(all(stated.values()))])
    return np.array(rows, np.int8)


def shares(table: np.ndarray) -> dict[str, float]:
    """The share of right ones by attribute, of those that state it."""
    columns = zip((*ATTRIBUTES, "all"), table.T, strict=True)
    return {name: round(float(column[column >= 0].mean()), 4) for name, column in columns if (column >= 0).any()}
