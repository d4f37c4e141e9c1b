"""What the page offers beside the text: four seeds, playback, links, words, pictures to start from; and a hanging server."""

import base64
import io
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools(embedded, browser) -> Any:
    """One page on a phone, shared: what a test leaves in it does not hinder the next."""
    from imagine_flash.tests.engine.server.conftest import Opened

    size = {"width": 390, "height": 844}
    opened = Opened(browser, embedded.url, viewport=size, permissions=["clipboard-read", "clipboard-write", "camera"])
    opened.go().shows("a fox on a pink background")
    yield opened
    assert opened.console == [] and opened.others == []
    opened.context.close()


def test_what_is_needed_is_in_sight_and_nothing_is_said_that_is_not_known(tools) -> None:
    page = tools.page
    for name in ("prompt", "examples", "picture", "controls", "actions", "figures"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= 844, name
    assert page.locator("#controls").bounding_box()["height"] < 60, "one row"
    figures = page.locator("#figures").inner_text()
    assert "model" in figures and "–" not in figures and "key to picture" not in figures
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_sentence_is_played_back_and_saved_as_a_gif(tools) -> None:
    page = tools.page
    page.fill("#prompt", "")
    for text in ("a", "a cat", "a cat on", "a cat on blue"):  # each is drawn, however slow the machine is
        page.locator("#prompt").press_sequentially(text[len(page.input_value("#prompt")) :])
        tools.shows(text)
    page.click("#play")
    tools.says("#reel", "a cat")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#reel")).to_be_hidden()
    with page.expect_download() as download:
        page.click("#gif")
    assert download.value.suggested_filename == "a-cat-on-blue-5.gif"
    film = Image.open(download.value.path())
    frames = getattr(film, "n_frames", 1)
    assert frames >= 4 and film.size == (256, 280) and film.info["loop"] == 0
    film.seek(frames - 1)
    last = np.asarray(film.convert("RGB").crop((0, 0, 256, 256)).resize((64, 64), Image.Resampling.BOX)).astype(int)
    with page.expect_download() as download:
        page.click("#download")
    assert np.abs(last - np.asarray(Image.open(download.value.path()).convert("RGB"))).mean() < 8


def test_a_film_has_one_size_and_one_that_is_not_saved_is_said(tools) -> None:
    """Frames of another size were written over the first one's width: stripes. After an error the button stayed grey."""
    frames = tools.page.evaluate("""async () => {
      const { Film } = await import("./page/film.js"), counts = [];
      const film = new Film(document.createElement("div"), (frames) => counts.push(frames));
      for (const size of ["512x512", "512x512", "640x384"]) film.add({ blob: new Blob(), prompt: "a", header: { size, seed: 1 } });
      return counts;
    }""")
    assert frames == [1, 2, 1]
    for text in ("a dog", "a cat"):  # two pictures of this page's own, or there is no film to save
        tools.page.fill("#prompt", text)
        tools.shows(text)
    tools.page.evaluate(
        "() => { [window.kept, window.createImageBitmap] = [createImageBitmap, () => Promise.reject(new Error())]; }"
    )
    tools.page.click("#gif")
    tools.says("#gif", "Not saved")
    tools.page.evaluate("() => { window.createImageBitmap = kept; }")
    playwright.expect(tools.page.locator("#gif")).to_be_enabled()
    playwright.expect(tools.page.locator("#gif")).to_have_text("GIF")


def test_one_of_four_seeds_is_taken_and_its_link_brings_it_back(tools) -> None:
    page = tools.page
    page.fill("#prompt", "a dog")
    tools.shows("a dog")
    page.click("#four")
    names = [page.locator("#grid button").nth(i).get_attribute("aria-label") for i in range(4)]
    assert names == [f"Take seed {seed}" for seed in (5, 6, 7, 8)]
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#grid")).to_be_hidden()
    playwright.expect(page.locator("#four")).to_be_focused()  # it was nowhere: Tab began at the top
    page.click("#four")
    page.click("#grid button:nth-child(3)")
    playwright.expect(page.locator("#four")).to_be_focused()
    tools.shows("a dog", 7)
    page.click("#link")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(tools.url) and "seed=7" in link and "prompt=a+dog" in link
    page.click("#smooth")
    assert page.evaluate("getComputedStyle(document.querySelector('#picture img')).imageRendering") == "auto"
    page.click("#smooth")


def test_words_are_added_by_click_and_reached_by_arrows(tools) -> None:
    page = tools.page
    page.fill("#prompt", "a")
    page.click("#vocabulary summary")
    words = page.locator("#vocabulary [role=toolbar]").first.locator("button")
    first, second = words.nth(0).inner_text(), words.nth(1).inner_text()
    words.nth(0).click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.input_value("#prompt") == f"a {first} {second}"
    assert page.locator("#vocabulary [tabindex='0']").count() == page.locator("#vocabulary [role=toolbar]").count()


def test_undo_brings_back_what_was_typed(tools) -> None:
    """Examples, words and pasted lines took with them all that could be undone."""
    page, prompt = tools.page, tools.page.locator("#prompt")
    page.fill("#prompt", "")
    prompt.press_sequentially("my own text")
    tools.shows("my own text")
    before = int(page.locator("#picture").get_attribute("data-seq"))
    draws_anew(page, lambda: page.click("#examples button"))
    assert int(page.locator("#picture").get_attribute("data-seq")) == before + 1, "it is asked for once"
    prompt.press("Control+Z")
    playwright.expect(prompt).to_have_value("my own text")
    page.click("#vocabulary .group button")
    playwright.expect(prompt).to_have_value(re.compile("my own text .+"))
    prompt.press("Control+Z")
    playwright.expect(prompt).to_have_value("my own text")
    page.evaluate(r"navigator.clipboard.writeText(' big\n  red')")
    prompt.press("Home")
    prompt.press("Control+ArrowRight")
    prompt.press("Control+V")
    playwright.expect(prompt).to_have_value(re.compile("^my +big red ?own text$"))
    assert prompt.evaluate("(field) => field.selectionEnd") < 14, "the caret went to the end"
    prompt.press("Control+Z")
    playwright.expect(prompt).to_have_value("my own text")


def test_the_command_fits_whatever_the_text_holds(tools) -> None:
    """Lines broke at dashes, of the text too, and nowhere else: the page became as wide as what came after one."""
    page = tools.page
    text = "a cat - " + "seen from far away to the left of a dog above a house " * 3 + "--" + "x" * 80
    page.fill("#prompt", text)
    tools.says("#command", "x" * 80)
    assert shlex.split(page.locator("#command").inner_text())[2] == text.strip()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_rate_counts_a_preview_and_its_picture_once(tools) -> None:
    rate = tools.page.evaluate("""async () => {
      const { Figures } = await import("./page/figures.js"), rate = document.createElement("dd");
      document.createElement("div").append(rate);
      const figures = new Figures({ rate });
      for (let seq = 1; seq < 9; seq++) for (const late of [0, 50]) figures.typed(seq, 100 * seq + late);
      return rate.textContent;
    }""")
    assert rate == "10 per s"


def test_a_late_picture_of_the_camera_is_dropped(tools) -> None:
    """One that was being packed as "Four seeds" was pressed closed them again."""
    asked, changes = tools.page.evaluate("""async () => {
      const { PictureInput } = await import("./page/input.js"), root = document.createElement("fieldset");
      root.append(document.createElement("legend"));
      document.body.append(root);
      const input = new PictureInput(root, { amount: "amount", value: 1 });
      let asked = 0, changes = 0;
      input.isBusy = () => asked++ % 2 === 1; // free as it is taken, busy once it is packed
      input.addEventListener("change", () => changes++);
      root.querySelector(".camera-on").click();
      for (let i = 0; i < 200 && asked < 6; i++) await new Promise((go) => setTimeout(go, 50));
      input.clear();
      root.remove();
      return [asked, changes];
    }""")
    assert asked >= 6 and changes <= 1, "only that it was switched off is told"


def test_a_camera_that_is_allowed_late_takes_nothing_from_what_was_chosen_meanwhile(tools) -> None:
    """It wiped a sketch, came on after "Remove", and two clicks left one on that nothing switched off."""
    found = tools.page.evaluate("""async () => {
      const { PictureInput } = await import("./page/input.js"), root = document.createElement("fieldset");
      root.append(document.createElement("legend"));
      document.body.append(root);
      const input = new PictureInput(root, { amount: "amount", value: 1 });
      const find = (name) => root.querySelector(`.${name}`), wait = (ms) => new Promise((go) => setTimeout(go, ms));
      const devices = navigator.mediaDevices, streams = [];
      devices.getUserMedia = async (wish) => {
        await wait(200); // somebody is asked
        streams.push(await MediaDevices.prototype.getUserMedia.call(devices, wish));
        return streams.at(-1);
      };
      const on = () => ["sketch", "camera"].filter((name) => find(`${name}-on`).ariaPressed === "true");
      const live = () => streams.flatMap((one) => one.getTracks()).filter((one) => one.readyState === "live").length;
      const states = [];
      for (const clicks of [["camera-on", "sketch-on"], ["sketch-on", "camera-on", "off"], ["camera-on", "camera-on"]]) {
        const before = streams.length, asked = clicks.filter((name) => name === "camera-on").length;
        for (const name of clicks) find(name).click();
        for (let i = 0; i < 200 && streams.length < before + asked; i++) await wait(50);
        await wait(300);
        states.push([...on(), live(), find("said").textContent]);
        input.clear();
        states.push([...on(), live()]);
      }
      delete devices.getUserMedia;
      root.remove();
      return states;
    }""")
    assert found == [["sketch", 0, ""], [0], [0, ""], [0], ["camera", 1, ""], [0]]


def green() -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (0, 160, 60)).save(file, "PNG")
    return file.getvalue()


def is_green(page: Any) -> bool:
    """Whether the picture that is shown is, in its mean."""
    red, green, blue = page.evaluate("""async () => {
      const image = document.querySelector("#picture img"), canvas = new OffscreenCanvas(1, 1);
      canvas.getContext("2d").drawImage(image, 0, 0, 1, 1);
      return [...canvas.getContext("2d").getImageData(0, 0, 1, 1).data].slice(0, 3);
    }""")
    return green > red and green > blue


def draws_anew(page: Any, act: Callable[[], object]) -> None:
    before = int(page.locator("#picture").get_attribute("data-seq") or 0)
    act()
    limit = time.monotonic() + 20  # Playwright's own waiting evaluates text, which the page's policy forbids
    while int(page.locator("#picture").get_attribute("data-seq")) <= before:
        assert time.monotonic() < limit
        page.wait_for_timeout(20)


def draw_a_line(page: Any, canvas: str) -> None:
    """With the mouse, on the canvas of that selector."""
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 120, steps=4)
    page.mouse.up()


def test_it_draws_from_a_file_a_sketch_and_a_camera(tools) -> None:
    page = tools.page
    page.fill("#prompt", "a cat")
    tools.shows("a cat")
    upload = {"name": "green.png", "mimeType": "image/png", "buffer": green()}
    page.evaluate("document.querySelector('#source .amount').value = 0.05")
    draws_anew(page, lambda: page.set_input_files("#source .file", upload))
    tools.says("#command", "--image START.png --strength 0.05")
    assert is_green(page)
    draws_anew(page, lambda: page.locator("#source .amount").fill("1"))
    tools.says("#source .amount-shown", "100 %")
    page.click("#source .sketch-on")
    page.click("#source .colours label:nth-child(4)")
    draws_anew(page, lambda: draw_a_line(page, "#source .sketch"))
    draws_anew(page, lambda: page.click("#source .camera-on"))
    page.click("#four")  # of the picture too
    playwright.expect(page.locator("#grid button").first).to_be_visible()
    draws_anew(page, lambda: page.click("#source .off"))
    assert "--image" not in page.locator("#command").inner_text()


def test_it_draws_from_what_is_dropped_or_pasted(tools) -> None:
    page, data = tools.page, base64.b64encode(green()).decode()
    page.fill("#prompt", "a dog")
    tools.shows("a dog")
    title = f"a dog, seed {page.input_value('#seed')}, 3 steps"
    playwright.expect(page.locator("#strip button").first).to_have_attribute("title", title)
    page.evaluate("document.querySelector('#source .amount').value = 0.05")

    def dropped(data: str, name: str, kind: str) -> Any:
        """What a drag carries: a file, or as text what is no file."""
        return page.evaluate_handle(
            """([data, name, type]) => {
              const carried = new DataTransfer(), bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt());
              if (name) carried.items.add(new File([bytes], name, { type }));
              else carried.setData("text/plain", data);
              return carried;
            }""",
            [data, name, kind],
        )

    draws_anew(
        page, lambda: page.dispatch_event("#stage", "drop", {"dataTransfer": dropped(data, "a.png", "image/png")})
    )
    assert is_green(page) and page.locator("#source .panel").is_visible()
    newest, before = page.locator("#strip button").nth(0), page.locator("#strip button").nth(1)
    playwright.expect(newest).to_have_attribute("title", f"{title}, from a picture")
    playwright.expect(before).to_have_attribute("title", title)  # it took the place of the text's own picture
    page.dispatch_event("#stage", "drop", {"dataTransfer": dropped("QUJD", "a.txt", "text/plain")})
    tools.says("#source .said", "That is no picture that this browser can read.")
    draws_anew(page, lambda: page.click("#source .off"))
    page.dispatch_event("#prompt", "drop", {"dataTransfer": dropped("QUJD", "", "")})
    assert page.locator("#source .panel").is_hidden() and page.input_value("#prompt") == "a dog"
    page.evaluate(
        """async (data) => {
          const blob = new Blob([Uint8Array.from(atob(data), (sign) => sign.charCodeAt())], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        data,
    )
    page.focus("#prompt")
    draws_anew(page, lambda: page.keyboard.press("Control+V"))
    assert is_green(page) and page.input_value("#prompt") == "a dog"
    draws_anew(page, lambda: page.click("#source .off"))


def test_another_model_is_offered_other_things(embedded, open_page) -> None:
    """One that knows every word, and has no encoder of pictures."""
    opened = open_page(embedded.url)

    def between(socket: Any) -> None:
        upstream = socket.connect_to_server()

        def down(message: Any) -> None:
            if isinstance(message, str) and '"ready"' in message:
                message = re.sub(r'"vocabulary": \{.*?\}', '"vocabulary": {}', message)
                message = message.replace('"from_pictures": true', '"from_pictures": false')
            socket.send(message)

        upstream.on_message(down)

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().says("#examples", "lighthouse")
    for part in ("source", "condition", "loras", "guided", "vocabulary"):
        assert opened.page.locator(f"#{part}").is_hidden(), part


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_a_server_that_hangs_is_noticed(embedded, open_page) -> None:
    """The page said "ready", and the picture of an older text stayed as if it were the newest one's."""
    opened = open_page(embedded.url).go()
    opened.shows("a fox on a pink background")
    embedded.process.send_signal(signal.SIGSTOP)
    try:
        opened.says("#trouble", "The server has said nothing for two seconds")
        assert opened.page.locator("#again").is_visible()
        opened.page.fill("#prompt", "a dog")
    finally:
        embedded.process.send_signal(signal.SIGCONT)
    opened.shows("a dog")
    opened.says("#state", "ready")
    assert not opened.page.locator("#trouble").is_visible()
