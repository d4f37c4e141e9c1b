"""The picture that goes with the table: one row a method, one column a prompt, the same noise down each column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...distill.data.captions import Caption, Scene
from ...distill.data.emoji import emoji_picture
from ...distill.grids import grid
from ...folders.files import atomic_file
from .method import Method
from .prompts import Prompts


def _scene(*objects: str, background: str, axis: str | None = None, pattern: str = "plain") -> Scene:
    return Scene(objects=objects, axis=axis, background=background, pattern=pattern)


SCENES: dict[str, Scene] = {
    "a fox on a pink background": _scene("fox", background="pink"),
    "kitty": _scene("cat", background="blue"),
    "a red apple on a green background": _scene("red apple", background="green", pattern="dots"),
    "🐼 on a striped orange background": _scene("panda", background="orange", pattern="stripes"),
    "a cat to the left of a dog": _scene("cat", "dog", axis="horizontal", background="purple"),
    "a rocket above a house on purple": _scene("rocket", "house", axis="vertical", background="purple"),
    "two owls on a blue background": _scene("owl", "owl", axis="horizontal", background="blue", pattern="checks"),
    "an octopus below a star on a gray background": _scene(
        "star", "octopus", axis="vertical", background="gray", pattern="gradient"
    ),
}
PROMPTS = tuple(SCENES)
_LINE = 15  # pixels from one line of a prompt to the next
_GAP = 2


def comparison_grid(
    shown: list[Method], *, scale: int = 2, label: int = 170, emoji_font: str | Path | None = None
) -> Image.Image:
    """Draw PROMPTS with every method; rendered scenes are examples of the same captions. label: pixels for the names."""
    rows = [method.draw(_prompts())[0] for method in shown]
    pictures = grid(np.concatenate(rows), columns=len(PROMPTS), scale=scale, gap=_GAP)
    height, width = (side * scale for side in rows[0].shape[1:3])
    small = ImageFont.load_default(11)
    titles = [_wrapped(prompt, width, small) for prompt in PROMPTS]
    top = max(_LINE * title.count("\n") for title in titles) + 17
    sheet = Image.new("RGB", (pictures.width + label, pictures.height + top), "white")
    sheet.paste(pictures, (label, top))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, method in enumerate(shown):
        pen.text((8, top + i * (height + _GAP * scale) + height // 2 - 8), method.name, fill="black", font=font)
    for i, title in enumerate(titles):
        _write(sheet, (label + i * (width + _GAP * scale), 2), title, small, emoji_font)
    return sheet


def _write(sheet: Image.Image, place: tuple[int, int], text: str, font: Any, emoji_font: str | Path | None) -> None:
    """Lines of text, with the emoji in them as pictures: the font of the text has none."""
    pen, (left, y) = ImageDraw.Draw(sheet), place
    for line in text.split("\n"):
        x = float(left)
        for word in line.split():
            if word.isascii():
                pen.text((x, y), word, fill="black", font=font)
                x += font.getlength(f"{word} ")
            else:
                picture = emoji_picture(word, _LINE - 2, emoji_font)
                sheet.paste(picture, (round(x), y), picture)
                x += _LINE + 2
        y += _LINE


def _wrapped(text: str, width: int, font: Any) -> str:
    """The words in lines of at most `width` pixels, where no word alone is wider."""
    first, *words = text.split()
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines)


def save_quality(record: dict[str, Any], picture: Image.Image, out: Path) -> None:
    """Write `out`.json, the record, and `out`.png, the pictures that go with it."""
    with atomic_file(out.with_name(f"{out.name}.png")) as temporary:
        picture.save(temporary, format="PNG")
    with atomic_file(out.with_name(f"{out.name}.json")) as temporary:
        Path(temporary).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _prompts() -> Prompts:
    nothing = dict.fromkeys(("states_axis", "states_order", "states_background", "states_pattern"), False)
    captions = [Caption(text=text, objects=(), **nothing) for text in PROMPTS]
    count = len(PROMPTS)
    return Prompts(
        captions=captions,
        scenes=list(SCENES.values()),
        seeds=list(range(7, 7 + count)),
        index=list(range(count)),
        split="",
        held_out=False,
    )
