"""What the page says and shows of a server that is busy, fails or draws something else than usual, and of odd input."""

import re
import shlex
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.slow


def half_a_character(page: Any) -> None:
    """Types what no server can draw."""
    page.evaluate("""() => {
      const prompt = document.getElementById("prompt");
      prompt.value = "\\ud800";
      prompt.dispatchEvent(new Event("input"));
    }""")


def test_a_busy_server_is_asked_again_and_other_errors_are_said(embedded, open_page) -> None:
    opened = open_page(embedded.url)
    asked: list[str] = []

    def between(socket: Any) -> None:
        upstream = socket.connect_to_server()

        def up(text: str) -> None:
            if "ping" in text:
                return upstream.send(text)
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
    half_a_character(opened.page)
    opened.says("#trouble", "Prompt: ")
    opened.page.fill("#prompt", "a cat")
    opened.shows("a cat")
    assert not opened.page.locator("#trouble").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_trouble_does_not_move_the_picture(embedded, open_page, width: int) -> None:
    """It stood above the picture: at each 429 the page jumped by 90 pixels."""
    opened = open_page(embedded.url, viewport={"width": width, "height": 844})
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
    half_a_character(opened.page)
    opened.says("#trouble", "Prompt: ")
    over, under = trouble.bounding_box(), picture.bounding_box()
    assert over is not None and under is not None
    assert under["y"] < over["y"] and over["y"] + over["height"] < under["y"] + under["height"]


def test_what_was_said_of_another_text_goes(embedded, open_page) -> None:
    """Of a text that is gone there stayed its unknown words, beside an error, and its error, above no text at all."""
    opened = open_page(embedded.url).go("#prompt=a+zebra")
    opened.says("#note", "The model never saw: zebra")
    half_a_character(opened.page)
    opened.says("#trouble", "Prompt: ")
    assert opened.page.locator("#note").inner_text() == ""
    opened.page.fill("#prompt", "")
    opened.says("#state", "ready")
    assert not opened.page.locator("#trouble").is_visible()


def test_a_seed_that_is_none_is_said_and_the_last_one_stays(embedded, open_page) -> None:
    """With the field empty nothing was drawn any more, and the page said "ready"."""
    opened = open_page(embedded.url).go("#prompt=a+cat&seed=8")
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


def test_steps_that_the_model_cannot_are_not_taken_from_the_address(embedded, open_page) -> None:
    """The page asked for 7 and showed the number that was chosen before."""
    opened = open_page(embedded.url).go("#prompt=a+cat&steps=2")
    opened.says("#command", "--steps 2")
    opened.page.evaluate("location.hash = '#prompt=a+dog&steps=7'")
    opened.shows("a dog")
    opened.says("#command", "--steps 2")
    assert opened.page.locator("#steps input:checked").input_value() == "2"
    assert not opened.page.locator("#trouble").is_visible()
    opened.page.evaluate("location.hash = '#prompt=a+dog&steps=1'")
    opened.says("#command", "--steps 1")
    assert opened.page.locator("#steps input:checked").input_value() == "1"


def test_the_last_pictures_are_there_after_a_reload(embedded, open_page) -> None:
    opened = open_page(embedded.url).go("#prompt=a+cat&seed=8")
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


def test_a_model_of_several_sizes(embedded, open_page) -> None:
    opened = open_page(embedded.url)

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
    assert box is not None and abs(box["width"] - box["height"]) < 1, "the last picture is shown as it was"
    assert "size=128x64" in opened.page.evaluate("location.hash")


def test_no_picture_is_stretched(start_server, two_sizes: Path, open_page) -> None:
    """One of the strip, or of an address, of another size than the one chosen was shown in the chosen one's box."""
    server = start_server("--model", two_sizes, "--backend", "onnxruntime")
    opened = open_page(server.url).go("#prompt=a+fox&seed=8")
    page, ratio = (
        opened.page,
        "(() => { const box = picture.getBoundingClientRect(); return box.width / box.height })()",
    )
    opened.shows("a fox", 8)
    page.evaluate(
        f"""() => {{
          window.stretched = [];
          (function watch() {{
            const image = document.querySelector("#picture img"), box = {ratio};
            const own = image ? image.naturalWidth / image.naturalHeight : box;
            if (Math.abs(box - own) > 0.02) stretched.push([box, own]);
            requestAnimationFrame(watch);
          }})();
        }}"""
    )

    def becomes(wanted: int) -> None:
        deadline = time.monotonic() + 20
        while abs(page.evaluate(ratio) - wanted) > 0.02:
            assert time.monotonic() < deadline
            page.wait_for_timeout(50)

    page.wait_for_selector("#strip li")
    page.select_option("#size", "128x64")
    becomes(2)
    page.click("#strip li:last-child button")
    becomes(1)
    page.evaluate("location.hash = '#prompt=a+fox&seed=8&size=128x64'")
    becomes(2)
    assert page.evaluate("stretched") == [] and page.locator("#size").input_value() == "128x64"
    page.fill("#prompt", "")
    page.select_option("#size", "64x64")
    becomes(1)
    server.stop()


def test_the_page_and_its_parts_are_served_whole(embedded) -> None:
    with httpx.Client(base_url=embedded.url) as http:
        page = http.get("/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert not re.findall(r"<[^>]+\s(?:style|on\w+)=|<script>|https?://", page.text)
        parts = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
        assert {part.rpartition(".")[2] for part in parts} >= {"css", "js"}
        for part in parts:
            answer = http.get(f"/{part}")
            assert answer.status_code == 200 and answer.headers["cache-control"] == "no-cache", part
