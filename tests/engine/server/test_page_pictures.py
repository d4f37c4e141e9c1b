"""The picture that is drawn from: of any size and shape, kept with what was drawn of it, refused, pasted beside text."""

import base64
import io
import re
from typing import Any

import pytest
from PIL import Image

from imagine_flash.tests.engine.server.test_page_tools import draw_a_line, draws_anew, green

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.slow

INPUT = """
const { PictureInput } = await import("./page/input.js");
const root = document.createElement("fieldset");
root.innerHTML = "<legend>Test</legend>";
document.body.append(root);
const input = new PictureInput(root, { amount: "Amount" });
const changes = async (act) => {
  const change = new Promise((done) => input.addEventListener("change", done, { once: true }));
  await act();
  await change;
};
"""
PIXELS = """() => {
  const image = document.querySelector("#picture img"), canvas = new OffscreenCanvas(8, 8);
  canvas.getContext("2d").drawImage(image, 0, 0, 8, 8);
  return [...canvas.getContext("2d").getImageData(0, 0, 8, 8).data].join();
}"""


@pytest.fixture
def drawn(embedded, open_page) -> Any:
    """A page that shows a cat."""
    opened = open_page(embedded.url).go("#prompt=a+cat&seed=5")
    opened.shows("a cat", 5)
    return opened


def start_from_green(page: Any, file: bytes = b"") -> None:
    upload = {"name": "green.png", "mimeType": "image/png", "buffer": file or green()}
    page.evaluate("document.querySelector('#source .amount').value = 0.05")
    draws_anew(page, lambda: page.set_input_files("#source .file", upload))


def pixels(page: Any) -> str:
    """Of the picture that is shown, once it is no preview."""
    page.wait_for_selector('#picture[data-preview="false"] img')
    return page.evaluate(PIXELS)


def settled(page: Any, title: str) -> None:
    playwright.expect(page.locator("#strip button").first).to_have_attribute("title", re.compile(title))


def test_a_picture_of_any_size_becomes_a_file_that_the_server_takes(drawn) -> None:
    """A noisy one had 400 kB at 1024 x 1024: the server closed the socket, and the page sent it again, for ever."""
    size = drawn.page.evaluate(f"""async () => {{
      {INPUT}
      const canvas = new OffscreenCanvas(1024, 1024), pixels = new ImageData(1024, 1024);
      for (let i = 0; i < pixels.data.length; i += 65536) crypto.getRandomValues(pixels.data.subarray(i, i + 65536));
      for (let i = 3; i < pixels.data.length; i += 4) pixels.data[i] = 255;
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      const file = await canvas.convertToBlob();
      input.offer(true, "1024x1024");
      await changes(() => input.take(file));
      return input.current.blob.size;
    }}""")
    assert size <= 262_144


def test_what_is_chosen_while_a_file_is_read_stays(drawn) -> None:
    """The file came later and took its place."""
    kept = drawn.page.evaluate(f"""async () => {{
      {INPUT}
      const canvas = new OffscreenCanvas(1024, 1024);
      canvas.getContext("2d").fillRect(0, 0, 1024, 1024);
      const file = await canvas.convertToBlob();
      input.offer(true, "64x64");
      const reading = input.take(file);
      root.querySelector(".sketch-on").click();
      await reading;
      return root.querySelector(".sketch-on").ariaPressed;
    }}""")
    assert kept == "true"


def test_a_picture_that_the_server_refuses_is_not_sent_again(drawn) -> None:
    page, sockets = drawn.page, []
    page.on("websocket", lambda socket: sockets.append(socket.url))
    page.evaluate("OffscreenCanvas.prototype.convertToBlob = async () => new Blob([new Uint8Array(300_000)])")
    page.click("#source .sketch-on")
    drawn.says("#source .said", "The picture is too large for this server.")
    drawn.says("#state", "ready")
    page.fill("#prompt", "a dog")
    drawn.shows("a dog", 5)
    page.wait_for_timeout(1000)
    assert len(sockets) == 1 and page.locator("#source .panel").is_hidden()
    assert not page.locator("#trouble").is_visible()


def test_another_size_cuts_the_picture_anew(drawn) -> None:
    """A circle became an ellipse, and what was cut off was lost."""
    found = drawn.page.evaluate(f"""async () => {{
      {INPUT}
      const canvas = new OffscreenCanvas(200, 200), paper = canvas.getContext("2d");
      paper.fillStyle = "#fff";
      paper.fillRect(0, 0, 200, 200);
      paper.fillStyle = "#000";
      paper.arc(100, 100, 50, 0, 7);
      paper.fill();
      const file = await canvas.convertToBlob();
      const sides = async () => {{
        const {{ width, height }} = await createImageBitmap(input.current.blob), copy = new OffscreenCanvas(width, height);
        copy.getContext("2d").drawImage(await createImageBitmap(input.current.blob), 0, 0);
        const dark = (x, y) => copy.getContext("2d").getImageData(x, y, 1, 1).data[0] < 128;
        const across = [...Array(width).keys()].filter((x) => dark(x, height / 2)).length;
        return [across, [...Array(height).keys()].filter((y) => dark(width / 2, y)).length];
      }};
      const all = [];
      input.offer(true, "128x128");
      await changes(() => input.take(file));
      all.push(await sides());
      for (const size of ["128x112", "128x128"]) {{
        await changes(() => input.offer(true, size));
        all.push(await sides());
      }}
      return all;
    }}""")
    assert all(abs(across - 64) <= 2 and abs(down - 64) <= 2 for across, down in found), found


def test_the_strip_brings_back_what_a_picture_was_drawn_from(drawn) -> None:
    """It brought the text back with whatever picture was there by then: another one than was clicked."""
    page = drawn.page
    settled(page, "a cat, seed 5, 3 steps$")
    text_only = pixels(page)
    start_from_green(page)
    settled(page, "from a picture")
    from_green = pixels(page)
    draws_anew(page, lambda: page.locator("#strip button").nth(1).click())
    assert pixels(page) == text_only and page.locator("#source .panel").is_hidden()
    draws_anew(page, lambda: page.click("#strip button[title*='from a picture']"))
    assert pixels(page) == from_green and page.locator("#source .panel").is_visible()
    assert page.input_value("#source .amount") == "0.05"
    page.reload()
    drawn.shows("a cat", 5)
    draws_anew(page, lambda: page.click("#strip button[title*='from a picture']"))
    drawn.says("#source .said", "The picture that was here is gone")
    assert pixels(page) == text_only
    assert drawn.console == []


def test_the_strip_keeps_what_was_drawn_from_two_pictures(drawn) -> None:
    """With one text and one amount they had one place in it: the newer one's picture, whatever was clicked."""
    page, file = drawn.page, io.BytesIO()
    Image.new("RGB", (64, 64), (200, 0, 160)).save(file, "PNG")
    settled(page, "a cat, seed 5, 3 steps$")
    start_from_green(page)
    settled(page, "from a picture")
    from_green = pixels(page)
    start_from_green(page, file.getvalue())
    playwright.expect(page.locator("#strip button[title*='from a picture']")).to_have_count(2)
    draws_anew(page, lambda: page.locator("#strip button[title*='from a picture']").nth(1).click())
    assert pixels(page) == from_green
    playwright.expect(page.locator("#strip button[title*='from a picture']")).to_have_count(2)
    page.reload()
    drawn.shows("a cat", 5)
    settled(page, "a cat, seed 5, 3 steps$")  # keeps them all anew
    page.reload()
    playwright.expect(page.locator("#strip button[title*='from a picture']")).to_have_count(2)


def test_the_strokes_of_one_sketch_have_one_place_in_the_strip(drawn) -> None:
    """Each had one, as each picture of a camera: a few of them pushed all earlier texts out."""
    page = drawn.page
    page.evaluate("document.querySelector('#source .amount').value = 0.05")
    draws_anew(page, lambda: page.click("#source .sketch-on"))
    settled(page, "from a picture")
    for colour in (4, 6):
        page.click(f"#source .colours label:nth-child({colour})")
        before = page.locator("#strip img").first.get_attribute("src")
        draw_a_line(page, "#source .sketch")
        playwright.expect(page.locator("#strip img").first).not_to_have_attribute(
            "src", before
        )  # kept, once it is settled
    playwright.expect(page.locator("#strip button[title*='from a picture']")).to_have_count(1)
    latest = pixels(page)
    draws_anew(page, lambda: page.fill("#prompt", "a dog"))
    draws_anew(page, lambda: page.click("#strip button[title*='from a picture']"))
    again = [abs(int(a) - int(b)) for a, b in zip(pixels(page).split(","), latest.split(","), strict=True)]
    assert max(again) <= 1  # what shares a call may differ by a level


def test_pasted_text_is_text_though_its_picture_comes_along(drawn) -> None:
    """Cells of a table were swallowed: the clipboard also holds a picture of them."""
    pasted = """([data, text]) => {
      const carried = new DataTransfer(), bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt());
      carried.items.add(new File([bytes], "a.png", { type: "image/png" }));
      if (text) carried.setData("text/plain", text);
      const event = new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true });
      document.getElementById("prompt").dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    page, data = drawn.page, base64.b64encode(green()).decode()
    assert not page.evaluate(pasted, [data, "a dog"])
    assert page.locator("#source .panel").is_hidden()
    draws_anew(page, lambda: page.evaluate(pasted, [data, ""]))
    assert page.locator("#source .panel").is_visible()
