"""The picture that goes with the table: one row a method, one column a prompt, the same noise down each column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..distill.grids import grid, to_pixels
from ..distill.networks import noise_of

if TYPE_CHECKING:
    from .evaluate import Method

PROMPTS = (
    "a fox on a pink background", "a cat", "a rocket on a blue background", "a penguin on an orange background",
    "a cat to the left of a dog", "a rocket above a house on a purple background",
    "a pizza to the right of a robot on green", "an octopus below a star on a gray background",
)  # fmt: skip
_SCALE, _LABEL, _GAP = 2, 170, 2


@torch.no_grad()
def comparison_grid(methods: list[Method]) -> Image.Image:
    """Draw PROMPTS with every method whose name does not say "no noise correction"."""
    shown = [m for m in methods if "no noise" not in m.name]
    rows = []
    for method in shown:
        networks = method.networks
        noise = noise_of(list(range(7, 7 + len(PROMPTS))), networks.latent_shape)
        uncond = networks.embed([""]) if method.guidance is not None else None
        text = networks.embed(list(PROMPTS))
        x0 = networks.sample(noise, text, method.table, uncond=uncond, guidance=method.guidance or 1.0)
        rows.append(to_pixels(networks.decode(x0)))
    pictures = grid(np.concatenate(rows), columns=len(PROMPTS), scale=_SCALE, gap=_GAP)
    height = rows[0].shape[1] * _SCALE
    sheet = Image.new("RGB", (pictures.width + _LABEL, pictures.height + 44), "white")
    sheet.paste(pictures, (_LABEL, 44))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, method in enumerate(shown):
        pen.text((8, 44 + i * (height + _GAP * _SCALE) + height // 2 - 8), method.name, fill="black", font=font)
    small = ImageFont.load_default(11)
    for i, prompt in enumerate(PROMPTS):
        words, lines = prompt.split(), [""]
        for word in words:
            lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1] + word) < 20 else [*lines, word]
        pen.multiline_text(
            (_LABEL + i * (height + _GAP * _SCALE), 2), "\n".join(lines), fill="black", font=small, spacing=1
        )
    return sheet
