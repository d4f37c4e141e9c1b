"""The picture of a record: prompts above, methods beside."""

import numpy as np
import pytest
from PIL import Image

from imagine_flash.benchmarks.quality.comparison import PROMPTS, comparison_grid
from imagine_flash.benchmarks.quality.methods import rendered_scenes
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.data.emoji import emoji_picture, find_font


def test_an_emoji_of_a_prompt_is_drawn_and_no_empty_box() -> None:
    """Of the emoji among the prompts one was an empty box, since the text's font has none."""
    try:
        find_font()
    except ImagineFlashError as error:
        pytest.skip(str(error))
    sheet = comparison_grid([rendered_scenes(None)], label=170)
    column = next(i for i, prompt in enumerate(PROMPTS) if prompt.startswith("🐼"))
    left, panda = 170 + column * 132, emoji_picture("🐼", 13)
    expected = Image.new("RGB", panda.size, "white")
    expected.paste(panda, (0, 0), panda)
    assert np.array_equal(np.asarray(sheet.crop((left, 2, left + 13, 15))), np.asarray(expected))
    assert 10 < np.asarray(expected).std() < 120
