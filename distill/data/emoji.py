"""Emoji scenes: endless captioned pictures whose attributes are known exactly.

A scene is one or two emoji on a coloured background. Its caption states some of the attributes and leaves the rest (place, size,
rotation, shade, pattern, sometimes the colour or the side) to chance, so that one caption has many right pictures. Scene `i` of a
seed is the same picture on every machine with the same font; a fixed set of (first, axis, second) combinations never appears in
the training split.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...core.errors import ImagineFlashError
from .captions import Caption, Scene, describe
from .vocabulary import AXES, BACKGROUND_NAMES, BACKGROUNDS, KINDS, OBJECT_NAMES, PATTERN_NAMES

FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
TILT = 10.0  # degrees to either side
PERIODS = (16, 20, 24)  # of stripes, checks and dots, in pixels of a 64x64 picture
TWINS = 0.12  # share of the scenes of two that show two of one kind
_SPRITE = 109  # the only size at which the bitmap font holds its glyphs


@functools.cache
def held_out_combinations() -> frozenset[tuple[str, str, str]]:
    """The (first, axis, second) combinations that training never shows: one in ten, fixed for ever."""
    every = [(a, axis, b) for a in OBJECT_NAMES for axis in AXES for b in OBJECT_NAMES if a != b]
    chosen = np.random.default_rng(5224).permutation(len(every))[: len(every) // 10]
    return frozenset(every[i] for i in chosen)


def draw_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Draw a scene: one object in half of them, else two, now and then of one kind; held-out scenes have two kinds."""
    background = BACKGROUND_NAMES[rng.integers(len(BACKGROUND_NAMES))]
    pattern = PATTERN_NAMES[rng.integers(len(PATTERN_NAMES))]
    if held_out:
        combinations = sorted(held_out_combinations())
        first, axis, second = combinations[rng.integers(len(combinations))]
        return Scene(objects=(first, second), axis=axis, background=background, pattern=pattern)
    if rng.random() >= 0.5:
        name = OBJECT_NAMES[rng.integers(len(OBJECT_NAMES))]
        return Scene(objects=(name,), axis=None, background=background, pattern=pattern)
    twins = rng.random() < TWINS
    while True:
        first, second = (OBJECT_NAMES[i] for i in rng.choice(len(OBJECT_NAMES), 2, replace=False))
        axis = AXES[rng.integers(2)]
        objects = (first, first) if twins else (first, second)
        if twins or (first, axis, second) not in held_out_combinations():
            return Scene(objects=objects, axis=axis, background=background, pattern=pattern)


def find_font(path: str | Path | None = None) -> Path:
    """The Noto Color Emoji font; ImagineFlashError with the way to get it where there is none."""
    places = [Path(path)] if path else [Path(p) for p in FONT_PLACES]
    for place in places:
        if place.is_file():
            return place
    raise ImagineFlashError(
        f"no emoji font at {', '.join(map(str, places))}; install Debian's package fonts-noto-color-emoji or give --font PATH"
    )


class SceneRenderer:
    """Draws scenes as (size, size, 3) uint8 pictures; holds the font's glyphs, cropped, premultiplied by nothing."""

    def __init__(self, size: int = 64, font: str | Path | None = None) -> None:
        place = find_font(font)
        try:
            face = ImageFont.truetype(str(place), _SPRITE)
        except OSError as error:
            raise ImagineFlashError(f"{place} is not a colour emoji font that Pillow can read ({error})") from None
        self.size = size
        self.sprites = {name: _glyph(face, kind.emoji) for name, kind in KINDS.items()}

    def render(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """Draw a scene; what the scene leaves open is drawn from `rng`. Returns (size, size, 3) uint8."""
        picture = self._background(scene, rng)
        for name, (x, y, side) in zip(scene.objects, self._places(scene, rng), strict=True):
            sprite = self.sprites[name]
            sprite = sprite.resize((side * 2, side * 2), Image.Resampling.BILINEAR)
            sprite = sprite.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC)
            sprite = sprite.resize((side, side), Image.Resampling.BOX)
            picture.paste(sprite, (round(x - side / 2), round(y - side / 2)), sprite)
        return np.asarray(picture, dtype=np.uint8)

    def _places(self, scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, int]]:
        """Centre x, centre y and side of each object, in pixels."""
        unit = self.size / 64
        if scene.axis is None:
            side = rng.uniform(32, 52)
            x, y = rng.uniform(side / 2, 64 - side / 2, 2)
            return [(x * unit, y * unit, round(side * unit))]
        sides = rng.uniform(26, 32, 2)
        gap = rng.uniform(0, 64 - sides.sum())
        start = rng.uniform(0, 64 - sides.sum() - gap)
        along = (start + sides[0] / 2, start + sides[0] + gap + sides[1] / 2)
        middle = rng.uniform(20, 44)
        across = np.clip(middle + rng.uniform(-7, 7, 2), 16, 48)
        places = [(a, c) if scene.axis == "horizontal" else (c, a) for a, c in zip(along, across, strict=True)]
        return [(x * unit, y * unit, round(s * unit)) for (x, y), s in zip(places, sides, strict=True)]

    def _background(self, scene: Scene, rng: np.random.Generator) -> Image.Image:
        hue, saturations, values = BACKGROUNDS[scene.background]
        hue = (hue + rng.uniform(-6, 6)) % 360 / 360
        saturation, value = rng.uniform(*saturations), rng.uniform(*values)
        shade = _rgb(hue, saturation, value)
        other = _rgb(hue, saturation, value - rng.uniform(0.10, 0.18))
        pattern = scene.pattern
        size, period = self.size, round(int(rng.choice(PERIODS)) * self.size / 64)
        if pattern == "gradient":
            ramp = np.linspace(0, 1, size)[:, None, None] * np.ones((1, size, 1))
            ramp = ramp if rng.random() < 0.5 else ramp[::-1]
            return Image.fromarray((np.asarray(shade) * (1 - ramp) + np.asarray(other) * ramp).round().astype(np.uint8))
        if pattern == "plain":
            return Image.new("RGB", (size, size), shade)
        rows, columns = np.mgrid[0:size, 0:size] + rng.integers(0, period * 2, 2)[:, None, None]
        if pattern == "stripes":
            mask = ((rows if rng.random() < 0.5 else columns) // period) % 2 == 0
        elif pattern == "checks":
            mask = (rows // period + columns // period) % 2 == 0
        else:
            mask = (rows % period - period / 2) ** 2 + (columns % period - period / 2) ** 2 < (period * 0.3) ** 2
        return Image.fromarray(np.where(mask[..., None], other, shade).astype(np.uint8))


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def emoji_picture(text: str, side: int, font: str | Path | None = None) -> Image.Image:
    """One emoji as an RGBA picture, side by side pixels. Raises ImagineFlashError without a font that has it."""
    face = ImageFont.truetype(str(find_font(font)), _SPRITE)
    return _glyph(face, text).resize((side, side), Image.Resampling.BOX)


def _glyph(face: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """One emoji as a square RGBA picture, cropped to what is drawn, with a margin for rotation."""
    canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((12, 12), text, font=face, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ImagineFlashError(f"the font has no glyph for {text}; use Noto Color Emoji")
    cropped = canvas.crop(box)
    side = max(cropped.size) + 6
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture (size, size, 3) uint8 with its caption and the scene that it shows."""

    image: np.ndarray
    caption: Caption
    scene: Scene


def scene_at(seed: int, index: int, *, held_out: bool = False) -> Scene:
    """Scene `index` of a seed, without its caption or picture."""
    return draw_scene(np.random.default_rng([seed, index, int(held_out)]), held_out=held_out)


def caption_at(
    seed: int, index: int, *, held_out: bool = False, strange_words: float = 0.1
) -> tuple[Scene, Caption, np.random.Generator]:
    """Scene and caption `index` of a seed, and the random state that draws the picture. Needs no font."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    scene = draw_scene(rng, held_out=held_out)
    return scene, describe(scene, rng, strange_words=strange_words), rng


class EmojiScenes:
    """Scene `i` of a seed, for every i >= 0: nothing is stored, any position can be resumed from."""

    def __init__(self, *, seed: int, size: int = 64, held_out: bool = False, font: str | Path | None = None) -> None:
        self.seed, self.held_out = seed, held_out
        self.renderer = SceneRenderer(size, font)

    def __getitem__(self, index: int) -> Example:
        scene, caption, rng = caption_at(self.seed, index, held_out=self.held_out)
        return Example(image=self.renderer.render(scene, rng), caption=caption, scene=scene)

    def __iter__(self) -> Iterator[Example]:
        index = 0
        while True:
            yield self[index]
            index += 1
