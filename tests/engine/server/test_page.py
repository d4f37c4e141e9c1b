"""The page in a real browser, of a real server: what is shown belongs to the newest text, and nothing stops it for good."""

import itertools
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

KEY = "0123456789abcdef-key"
LOG_OF_PICTURES = """
window.seen = [];
addEventListener("DOMContentLoaded", () => {
  const picture = document.getElementById("picture");
  new MutationObserver(() => {
    const { seq, prompt, preview, seed } = picture.dataset;
    seen.push({ seq: Number(seq), prompt, preview: preview === "true", seed, images: picture.querySelectorAll("img").length });
  }).observe(picture, { attributes: true, attributeFilter: ["data-seq"] });
});
"""


@pytest.fixture(scope="module")
def server(start_server) -> Any:
    return start_server()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        one = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


class Opened:
    """A page, and what it did that no page should: messages on the console, requests to others."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.console: list[str] = []
        self.others: list[str] = []
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._asked(request.url, url))
        self.page.on("websocket", lambda socket: self._asked(socket.url.replace("ws://", "http://"), url))
        self.page.add_init_script(LOG_OF_PICTURES)
        self.url = url

    def _asked(self, target: str, own: str) -> None:
        if not target.startswith((f"{own}/", "blob:", "data:")):
            self.others.append(target)

    def go(self, fragment: str = "") -> "Opened":
        self.page.goto(f"{self.url}/{fragment}")
        return self

    def shows(self, prompt: str, seed: int | None = None) -> None:
        """Waits for the full picture of that text."""
        wanted = f'#picture[data-prompt="{prompt}"][data-preview="false"]'
        self.page.wait_for_selector(wanted + (f'[data-seed="{seed}"]' if seed is not None else "") + " img")

    def seen(self) -> list[dict[str, Any]]:
        return self.page.evaluate("seen")

    def says(self, selector: str, text: str) -> None:
        playwright.expect(self.page.locator(selector)).to_contain_text(text, timeout=20_000)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    opened: list[Opened] = []

    def start(url: str, **options: Any) -> Opened:
        opened.append(Opened(browser, url, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.context.close()


def test_the_last_picture_is_of_the_last_text_and_none_goes_back(server, open_page) -> None:
    opened = open_page(server.url).go()
    opened.shows("a fox on a pink background")
    text = "a cat to the left of a dog on a blue background"
    opened.page.locator("#prompt").press_sequentially(text, delay=1000 / 12)  # the example is selected: it is replaced
    opened.shows(text)
    seen = opened.seen()
    order = [(one["seq"], not one["preview"]) for one in seen]
    assert order == sorted(order) and len(set(order)) == len(order)
    assert all(text.startswith(one["prompt"]) for one in seen[1:]) and all(one["images"] == 1 for one in seen)
    assert len(seen) > 10 and len({one["seed"] for one in seen}) == 1
    for field, unit in (
        ("all", "ms"),
        ("model", "ms"),
        ("queue", "ms"),
        ("rest", "ms"),
        ("page", "ms"),
        ("rate", "per s"),
    ):
        assert re.fullmatch(rf"[\d.]+ {unit}", opened.page.locator(f"#f-{field}").inner_text())
    assert opened.console == [] and opened.others == []


def test_a_picture_of_an_older_text_that_comes_late_is_not_shown(server, open_page) -> None:
    """The server never sends one; a page that trusted it would show the wrong picture after the first mistake there."""
    opened = open_page(server.url)
    kept: list[bytes] = []

    def between(socket: Any) -> None:
        upstream = socket.connect_to_server()

        def down(message: Any) -> None:
            if isinstance(message, bytes):
                kept.append(message)
            socket.send(message)
            if len(kept) > 1:
                socket.send(kept[0])

        upstream.on_message(down)

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().shows("a fox on a pink background")
    opened.page.fill("#prompt", "a dog")
    opened.shows("a dog")
    opened.page.fill("#prompt", "")
    opened.says("#picture", "Type, and it is drawn.")
    opened.page.fill("#prompt", "a cat")
    opened.shows("a cat")
    opened.page.wait_for_timeout(300)
    shown = [prompt for prompt, _ in itertools.groupby(one["prompt"] for one in opened.seen())]  # previews come too
    assert shown == ["a fox on a pink background", "a dog", "", "a cat"]


def test_a_preview_gives_way_to_the_full_picture(server, open_page) -> None:
    opened = open_page(server.url)

    def between(socket: Any) -> None:
        upstream = socket.connect_to_server()
        socket.on_message(lambda text: upstream.send(text.replace('"preview":false', '"preview":true')))

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().shows("a fox on a pink background")
    assert [one["preview"] for one in opened.seen()] in ([True, False], [False])


def test_by_keyboard_alone(server, open_page) -> None:
    opened = open_page(server.url).go()
    page, focused = opened.page, "document.activeElement.id || document.activeElement.textContent"
    opened.shows("a fox on a pink background", 5)
    assert page.evaluate(focused) == "prompt"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "a fox"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    opened.shows("a cat to the left of a dog", 5)
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    opened.says("#command", "--steps 2")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "seed"
    page.keyboard.press("ArrowUp")
    opened.shows("a cat to the left of a dog", 6)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    playwright.expect(page.locator("#picture")).not_to_have_attribute("data-seed", "6")
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.closest('ul')?.id"))
    assert {"download", "strip", "copy"} <= reached
    assert opened.console == []


def test_the_strip_the_address_and_the_command_bring_a_picture_back(server, open_page) -> None:
    said = 'it\'s a "fox" & $HOME `x` -- zebra'
    opened = open_page(server.url).go("#prompt=a+cat&seed=8&steps=2")
    page = opened.page
    opened.shows("a cat", 8)
    assert page.locator("#steps input:checked").input_value() == "2"
    page.wait_for_selector("#strip li")
    page.fill("#prompt", said)
    page.wait_for_selector("#strip li:nth-child(2)")
    words = shlex.split(page.locator("#command").inner_text())
    assert words == ["imagine-flash", "generate", said, "--seed", "8", "--steps", "2", "-o", "picture.png"]
    assert "the same picture, but for rounding" in page.locator("#shell").get_attribute("title").lower()
    opened.says("#note", "The model never saw: ")
    assert "zebra" in page.locator("#note").inner_text()
    shared = page.evaluate("location.hash")
    page.click("#strip li:nth-child(2) button")
    opened.shows("a cat", 8)
    assert page.locator("#note").inner_text() == ""
    page.evaluate(f"location.hash = {shared!r}")
    playwright.expect(page.locator("#prompt")).to_have_value(said)
    page.fill("#prompt", "a cat")
    opened.shows("a cat")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "a-cat-8.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    page.fill("#prompt", "-o /tmp/x")
    opened.shows("-o /tmp/x")
    assert shlex.split(page.locator("#command").inner_text())[-2:] == ["--", "-o /tmp/x"]
    assert opened.console == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (320, 568)])
def test_it_fits_and_follows_the_scheme(server, open_page, scheme: str, width: int, height: int) -> None:
    opened = open_page(server.url, viewport={"width": width, "height": height}, color_scheme=scheme)
    opened.go("#prompt=a+rocket+above+a+house+on+a+blue+background")
    opened.page.wait_for_selector("#strip li")
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert opened.page.evaluate(fits)
    box = opened.page.locator("#picture").bounding_box()
    assert box is not None and abs(box["width"] - box["height"]) < 1 and box["width"] > 0.35 * width
    assert (
        opened.page.evaluate("getComputedStyle(document.querySelector('#picture img')).imageRendering") == "pixelated"
    )
    red = int(opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0]"))
    assert red > 200 if scheme == "light" else red < 60
    assert opened.page.screenshot().startswith(b"\x89PNG")
    opened.page.fill("#prompt", "a " + "very" * 30 + " long word")
    opened.says("#trouble", "shorten it")
    assert opened.page.evaluate(fits)
    assert opened.console == [] and opened.others == []


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1366, 650), (1920, 950), (1000, 800), (844, 390)])
def test_what_one_looks_at_is_in_sight(server, open_page, width: int, height: int) -> None:
    """At 1280 x 720 the figures were below the fold and Download in a row of its own; sideways, a phone showed no picture."""
    opened = open_page(server.url, viewport={"width": width, "height": height}).go()
    opened.page.wait_for_selector("#strip li")
    parts = ["prompt", "picture", "steps", "seed", "download", *(["figures"] if height > 400 else [])]
    boxes = {name: opened.page.locator(f"#{name}").bounding_box() for name in parts}
    for name, box in boxes.items():
        assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= height, name
    assert boxes["steps"]["y"] == boxes["seed"]["y"] == boxes["download"]["y"]
    assert boxes["picture"]["height"] >= 0.5 * height and boxes["picture"]["height"] % 64 == 0


def test_a_server_that_dies_is_missed_and_found_again(server, open_page) -> None:
    opened = open_page(server.url).go()
    opened.shows("a fox on a pink background")
    server.kill()
    opened.says("#trouble", "The server does not answer")
    opened.says("#state", "no connection")
    opened.page.fill("#prompt", "a dog")
    server.start(0)
    opened.shows("a dog")
    opened.says("#state", "ready")
    assert not opened.page.locator("#trouble").is_visible()
    assert not [line for line in opened.console if "uncaught" in line]


def test_while_the_model_is_loaded_the_page_says_so(server, open_page) -> None:
    opened, closed = open_page(server.url), []

    def between(socket: Any) -> None:
        if len(closed) < 2:
            closed.append(time.monotonic())
            socket.close(code=1013, reason="the model is still being loaded")
        else:
            socket.connect_to_server()

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().says("#trouble", "The model is being loaded")
    opened.shows("a fox on a pink background")
    opened.says("#state", "ready")
    assert closed[1] - closed[0] > 0.2, "it waits before it tries again"


def test_a_busy_server_is_asked_again_and_other_errors_are_said(server, open_page) -> None:
    opened = open_page(server.url)
    asked: list[str] = []

    def between(socket: Any) -> None:
        upstream = socket.connect_to_server()

        def up(text: str) -> None:
            asked.append(text)
            if len(asked) < 3:
                seq = re.search(r'"seq":(\d+)', text)
                assert seq is not None
                socket.send(
                    f'{{"type": "error", "seq": {seq[1]}, "error": {{"message": "many wait", "code": "busy"}}}}'
                )
            else:
                upstream.send(text)

        socket.on_message(up)

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().says("#trouble", "Too many pictures are waiting")
    opened.shows("a fox on a pink background")
    assert len(asked) == 3 and not opened.page.locator("#trouble").is_visible()
    opened.page.fill("#prompt", "a cat " * 300)
    opened.says("#trouble", "tokens")
    opened.page.fill("#prompt", "a cat")
    opened.shows("a cat")
    assert not opened.page.locator("#trouble").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_trouble_does_not_move_the_picture(server, open_page, width: int) -> None:
    """It stood above the picture: at each 429 the page jumped by 90 pixels."""
    opened = open_page(server.url, viewport={"width": width, "height": 844})
    refused = []

    def between(socket: Any) -> None:
        upstream = socket.connect_to_server()

        def up(text: str) -> None:
            if '"a dog"' in text and not refused:
                refused.append(text)
                seq = re.search(r'"seq":(\d+)', text)
                assert seq is not None
                socket.send(f'{{"type": "error", "seq": {seq[1]}, "error": {{"message": "many", "code": "busy"}}}}')
            else:
                upstream.send(text)

        socket.on_message(up)

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go("#prompt=a+cat").shows("a cat")
    picture, trouble = opened.page.locator("#picture"), opened.page.locator("#trouble")
    before = picture.bounding_box()
    opened.page.evaluate(
        """() => new MutationObserver(([{ target }]) => {
          if (!target.hidden) window.during = document.getElementById("picture").getBoundingClientRect().y;
        }).observe(document.getElementById("trouble"), { attributes: true, attributeFilter: ["hidden"] })"""
    )
    opened.page.fill("#prompt", "a dog")
    opened.shows("a dog")
    assert refused and before is not None and opened.page.evaluate("during") == before["y"]
    opened.page.fill("#prompt", "dog " * 40)
    opened.says("#trouble", "tokens")
    over, under = trouble.bounding_box(), picture.bounding_box()
    assert over is not None and under is not None
    assert under["y"] < over["y"] and over["y"] + over["height"] < under["y"] + under["height"]


def test_what_was_said_of_another_text_goes(server, open_page) -> None:
    """Of a text that is gone there stayed its unknown words, beside an error, and its error, above no text at all."""
    opened = open_page(server.url).go("#prompt=a+zebra")
    opened.says("#note", "The model never saw: zebra")
    opened.page.fill("#prompt", "zebra " * 80)
    opened.says("#trouble", "tokens")
    assert opened.page.locator("#note").inner_text() == ""
    opened.page.fill("#prompt", "")
    opened.says("#state", "ready")
    assert not opened.page.locator("#trouble").is_visible()


def test_a_seed_that_is_none_is_said_and_the_last_one_stays(server, open_page) -> None:
    """With the field empty nothing was drawn any more, and the page said "ready"."""
    opened = open_page(server.url).go("#prompt=a+cat&seed=8")
    opened.shows("a cat", 8)
    seed = opened.page.locator("#seed")
    for wrong in ("", "9007199254740992", "1.5", "-1"):
        seed.fill(wrong)
        opened.says("#note", "A seed is a whole number, 0 to 9007199254740991")
        assert seed.get_attribute("aria-invalid") == "true"
        opened.page.fill("#prompt", f"a pizza {len(wrong)}")
        opened.shows(f"a pizza {len(wrong)}", 8)
        opened.says("#note", "A seed is")
    assert "seed=8" in opened.page.locator("#copy").evaluate("() => location.hash")
    seed.fill("9")
    opened.shows("a pizza 2", 9)
    assert seed.get_attribute("aria-invalid") == "false"
    playwright.expect(opened.page.locator("#note")).not_to_contain_text("seed")


def test_steps_that_the_model_cannot_are_not_taken_from_the_address(server, open_page) -> None:
    """The page asked for 7 and showed the number that was chosen before."""
    opened = open_page(server.url).go("#prompt=a+cat&steps=2")
    opened.says("#command", "--steps 2")
    opened.page.evaluate("location.hash = '#prompt=a+dog&steps=7'")
    opened.shows("a dog")
    opened.says("#command", "--steps 2")
    assert opened.page.locator("#steps input:checked").input_value() == "2"
    assert not opened.page.locator("#trouble").is_visible()
    opened.page.evaluate("location.hash = '#prompt=a+dog&steps=1'")
    opened.says("#command", "--steps 1")
    assert opened.page.locator("#steps input:checked").input_value() == "1"


def test_the_last_pictures_are_there_after_a_reload(server, open_page) -> None:
    opened = open_page(server.url).go("#prompt=a+cat&seed=8")
    opened.page.wait_for_selector("#strip li")
    opened.page.click("#examples button:nth-child(4)")
    opened.page.wait_for_selector("#strip li:nth-child(2) img[src^='data:']")
    opened.page.reload()
    opened.shows("a penguin on an orange background", 8)
    playwright.expect(opened.page.locator("#strip li")).to_have_count(2)
    old = opened.page.locator("#strip li:nth-child(2)")
    assert old.locator("img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 64
    old.locator("button").click()
    opened.shows("a cat", 8)
    assert opened.console == []


def test_the_command_of_another_model_asks_for_its_path(start_server, tiny_artifact: Path, open_page) -> None:
    """It said `--model NAME`, where `imagine-flash generate` wants a path, which a server does not tell."""
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime")
    opened = open_page(server.url).go("#prompt=a+cat&seed=8")
    opened.shows("a cat", 8)
    words = shlex.split(opened.page.locator("#command").inner_text())
    assert words[words.index("--model") + 1].startswith("PATH/OF/")
    assert str(tiny_artifact.parent) not in opened.page.content()
    server.stop()


def test_a_model_of_several_sizes(server, open_page) -> None:
    opened = open_page(server.url)

    def between(socket: Any) -> None:
        upstream = socket.connect_to_server()

        def down(message: Any) -> None:
            known = not isinstance(message, str)
            socket.send(message if known else message.replace('"sizes": ["64x64"]', '"sizes": ["64x64", "128x64"]'))

        upstream.on_message(down)

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().shows("a fox on a pink background")
    assert "size" not in opened.page.evaluate("location.hash")
    opened.page.select_option("#size", "128x64")
    opened.says("#trouble", "draws 64x64")
    box = opened.page.locator("#picture").bounding_box()
    assert box is not None and abs(box["width"] - 2 * box["height"]) < 1
    assert "size=128x64" in opened.page.evaluate("location.hash")


def test_the_key_field(tmp_path: Path, start_server, open_page) -> None:
    (tmp_path / "keys").write_text(KEY)
    server = start_server("--api-key-file", tmp_path / "keys")
    opened = open_page(server.url, viewport={"width": 390, "height": 844}).go()
    page = opened.page
    opened.says("#trouble", "those who have a key")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    playwright.expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("no/slash=")
    page.keyboard.press("Enter")
    opened.says("#trouble", "cannot send that key")
    page.fill("#key", "a-wrong-key-of-some-length")
    page.keyboard.press("Enter")
    opened.says("#trouble", "does not know that key")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    opened.shows("a fox on a pink background")
    assert not page.locator("#trouble").is_visible() and not page.locator("#key").is_visible()
    playwright.expect(page.locator("#prompt")).to_be_focused()
    page.reload()
    opened.shows("a fox on a pink background")
    assert KEY not in page.url and KEY not in page.content()
    assert opened.others == [] and not [line for line in opened.console if "uncaught" in line]


def test_the_page_and_its_parts_are_served_whole(server) -> None:
    with httpx.Client(base_url=server.url) as http:
        page = http.get("/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert not re.findall(r"<[^>]+\s(?:style|on\w+)=|<script>|https?://", page.text)
        for part in re.findall(r'(?:href|src)="(page/[^"]+)"', page.text):
            answer = http.get(f"/{part}")
            assert answer.status_code == 200 and answer.headers["cache-control"] == "no-cache", part
