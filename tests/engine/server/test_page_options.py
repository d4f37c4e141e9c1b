"""What the page offers of a model with a ControlNet, LoRAs and guidance, and what it asks for while somebody types."""

import base64
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.folders.manifests import Guidance
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.tests import control, pipelines
from imagine_flash.tests.engine.server.conftest import Opened, png
from imagine_flash.tests.engine.server.test_page_tools import draw_a_line, draws_anew
from imagine_flash.tests.loras import ATTENTION, write_lora

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.slow

PROMPT = "a fox on pink"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A student with a ControlNet that was made for guidance, and two LoRAs for it."""
    root = tmp_path_factory.mktemp("options")
    student = pipelines.build_student(root / "student", half=False)
    pipelines.describe(student, guidance=Guidance(default=1.5, range=(1, 4)))
    network = control.saved(control.build_controlnet(pipelines.build_pipeline().unet), root / "network")
    targets = {"unet": ATTENTION}
    loras = {
        name: str(write_lora(root / name, pipelines.build_pipeline(), targets, seed=len(name)))
        for name in ("ink", "pixel art")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGINE_FLASH_CACHE", str(root / "cache"))
        yield student_of(student, ModelOptions(controlnet=str(network))), loras


@pytest.fixture(scope="module")
def url(parts: tuple[Path, dict[str, str]], start_server: Callable[..., Any]) -> str:
    student, loras = parts
    options = [word for name, path in loras.items() for word in ("--lora", f"{name}={path}")]
    return start_server("--model", student, "--backend", "torch", "--device", "cpu", *options, seconds=120).url


@pytest.fixture(scope="module")
def draws(parts: tuple[Path, dict[str, str]]) -> Iterator[Callable[..., np.ndarray]]:
    student, loras = parts
    with Engine.load(student, backend="torch", device="cpu", loras=loras) as engine:
        yield lambda **asked: engine.generate(GenerateRequest(prompt=PROMPT, seed=5, **asked)).images[0].astype(int)


def shown(page: Any) -> np.ndarray:
    """The pixels of the picture that is shown, (64, 64, 3), once it is no preview."""
    page.wait_for_selector('#picture[data-preview="false"] img')
    data = page.evaluate("""() => {
      const image = document.querySelector("#picture img"), canvas = new OffscreenCanvas(64, 64);
      canvas.getContext("2d").drawImage(image, 0, 0);
      return [...canvas.getContext("2d").getImageData(0, 0, 64, 64).data];
    }""")
    return np.array(data).reshape(64, 64, 4)[..., :3]


def upload(pixels: np.ndarray) -> dict[str, Any]:
    return {"name": "edges.png", "mimeType": "image/png", "buffer": png(pixels)}


def test_a_condition_and_loras_go_with_every_key(url: str, draws: Callable[..., np.ndarray], open_page: Any) -> None:
    opened = open_page(url).go("#seed=5&prompt=a+fox")
    page = opened.page
    opened.shows("a fox", 5)
    for part in ("source", "condition", "loras", "guided"):
        assert page.locator(f"#{part}").is_visible(), part
    assert page.locator("#condition .camera-on").is_hidden()
    draws_anew(page, lambda: page.get_by_label("ink", exact=True).fill("0.8"))
    draws_anew(page, lambda: page.get_by_label("pixel art").fill("-0.5"))
    draws_anew(page, lambda: page.set_input_files("#condition .file", upload(control.picture(1))))
    draws_anew(page, lambda: page.locator("#condition .amount").fill("1.5"))
    page.locator("#prompt").press_sequentially(PROMPT)  # in the place of the text, which is selected
    opened.shows(PROMPT, 5)
    asked = {"lora": {"ink": 0.8, "pixel art": -0.5}, "condition": control.picture(1), "condition_scale": 1.5}
    assert np.abs(shown(page) - draws(**asked)).max() <= 1
    words = shlex.split(page.locator("#command").inner_text())
    assert "ink=PATH/OF/ink:0.8" in words and "pixel art=PATH/OF/pixel art:-0.5" in words
    assert words[words.index("--condition") :][:4] == ["--condition", "CONDITION.png", "--condition-scale", "1.5"]
    title = f"{PROMPT}, seed 5, 3 steps, ink 0.8, pixel art -0.5, under a picture"
    playwright.expect(page.locator("#strip button").first).to_have_attribute("title", title)
    page.click("#four")  # by the image API, with the same
    draws_anew(
        page, lambda: page.click("#grid button:nth-child(1)")
    )  # the same again, on a slow machine a preview first
    assert np.abs(shown(page) - draws(**asked)).max() <= 1
    draws_anew(page, lambda: page.click("#condition .off"))
    assert np.abs(shown(page) - draws(lora=asked["lora"])).max() <= 1
    assert "lora=ink%3A0.8" in page.evaluate("location.hash")
    draws_anew(page, lambda: [page.get_by_label(name, exact=True).fill("0") for name in ("ink", "pixel art")])
    opened.says("#loras", "off")
    assert "--lora" not in page.locator("#command").inner_text()
    assert opened.console == [] and opened.others == []


def test_a_condition_is_drawn_dropped_and_pasted_where_it_belongs(url: str, open_page: Any) -> None:
    opened = open_page(url).go("#seed=5&prompt=a+fox")
    page, data = opened.page, base64.b64encode(png(control.picture(1))).decode()
    opened.shows("a fox", 5)
    carried = page.evaluate_handle(
        """(data) => {
          const carried = new DataTransfer(), bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt());
          carried.items.add(new File([bytes], "a.png", { type: "image/png" }));
          return carried;
        }""",
        data,
    )
    draws_anew(page, lambda: page.dispatch_event("#condition legend", "drop", {"dataTransfer": carried}))
    assert page.locator("#condition .panel").is_visible() and page.locator("#source .panel").is_hidden()
    draws_anew(page, lambda: page.dispatch_event("#stage", "drop", {"dataTransfer": carried}))
    assert page.locator("#source .panel").is_visible()
    draws_anew(page, lambda: page.click("#source .off"))
    draws_anew(page, lambda: page.click("#condition .off"))
    draws_anew(page, lambda: page.click("#condition .sketch-on"))
    draws_anew(page, lambda: draw_a_line(page, "#condition .sketch"))
    ink = page.evaluate(
        "[...document.querySelector('#condition .sketch').getContext('2d').getImageData(0, 0, 256, 256).data]"
    )
    line = np.array(ink).reshape(256, 256, 4)[..., :3].mean(-1)
    assert line.max() == 255 and line[0, 0] < 30  # white on black, as such networks read it
    assert opened.console == []


def test_guidance_and_what_to_draw_away_from(url: str, draws: Callable[..., np.ndarray], open_page: Any) -> None:
    opened = open_page(url).go(f"#seed=5&prompt={PROMPT.replace(' ', '+')}")
    page = opened.page
    opened.shows(PROMPT, 5)
    assert np.abs(shown(page) - draws()).max() <= 1 and "--guidance" not in page.locator("#command").inner_text()
    draws_anew(page, lambda: page.locator("#guidance").fill("3"))
    page.locator("#negative").press_sequentially("a dog")
    opened.says("#command", "--negative-prompt 'a dog'")
    assert np.abs(shown(page) - draws(guidance=3, negative_prompt="a dog")).max() <= 1
    draws_anew(page, lambda: page.locator("#guidance").fill("1"))
    assert page.locator("#negative").is_disabled()
    assert np.abs(shown(page) - draws(guidance=1)).max() <= 1


def test_an_address_with_a_lora_that_is_not_there_says_which_are(url: str, open_page: Any) -> None:
    opened = open_page(url).go("#prompt=a+fox&seed=5&lora=pixl:0.8&lora=ink:0.5")
    opened.says("#trouble", "No LoRA 'pixl'")
    opened.says("#trouble", "it has ink, pixel art")
    opened.page.get_by_label("pixl").fill("0")
    opened.shows("a fox", 5)
    opened.says("#command", "--lora ink=PATH/OF/ink:0.5")
    assert not opened.page.locator("#trouble").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(url: str, browser: Any, scheme: str, tmp_path: Path) -> None:
    opened = Opened(browser, url, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = opened.go("#seed=5&prompt=a+fox&lora=ink:0.8").page
    opened.shows("a fox", 5)
    draws_anew(page, lambda: page.set_input_files("#condition .file", upload(control.picture(1))))
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    for part in ("guided", "loras", "condition"):
        box = page.locator(f"#{part}").bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390, part
    draws_anew(page, lambda: page.click("#condition .sketch-on"))
    assert page.evaluate(fits), "the colours stood beside the window"
    assert page.screenshot(full_page=True, path=tmp_path / "page.png").startswith(b"\x89PNG")
    assert opened.console == []
    opened.context.close()
