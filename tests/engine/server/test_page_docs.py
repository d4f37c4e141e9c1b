"""The page at /docs in a real browser: it fits its window, says what the document says, and works behind a path's prefix."""

import re
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_it_shows_every_route_and_asks_nobody_else(embedded, open_page, width: int) -> None:
    """In a wide window it stood at the right edge, as what lies beside the picture does, and broke words: "defaul t"."""
    opened = open_page(embedded.url, viewport={"width": width, "height": 800}).go("docs")
    opened.says("#operations", "POST /v1/images/edits")
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    shown = page.locator("h2").all_inner_texts()
    assert len(shown) == 7 and "GET /metrics" in shown
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("main").bounding_box()
    assert (
        box is not None
        and abs(box["x"] - (width - box["x"] - box["width"])) <= 1
        and box["width"] >= min(width - 40, 700)
    )
    lines = page.evaluate(
        """() => [...document.querySelectorAll("th, td:first-child, td:last-child")].map((cell) => {
          const range = new Range();
          range.selectNodeContents(cell);
          return cell.textContent.includes(" ") ? 0 : range.getClientRects().length;
        })"""
    )
    assert max(lines) == 1
    assert not opened.others and not opened.console


def test_a_bound_that_javascript_cannot_count_is_a_power(embedded, open_page) -> None:
    """It said 9223372036854776000."""
    opened = open_page(embedded.url).go("docs")
    opened.says("#operations", "-1 to 2^63 - 1")
    opened.says("#operations", "1 to 32000 characters")
    opened.says("#operations", "file; PNG, JPEG or WebP")
    assert "9223372036854776000" not in opened.page.locator("main").inner_text()


def test_behind_a_prefix_the_page_finds_it_and_its_own_parts(embedded, open_page) -> None:
    """Its parts and /openapi.json had absolute paths; and no link led to it."""
    opened = open_page(embedded.url)

    def without(route: Any) -> None:
        inner = route.request.url.replace("/inner/draw/", "/")
        route.fulfill(response=route.fetch(url=inner))

    opened.page.route(re.compile("/inner/draw/"), without)
    opened.go("inner/draw/")
    opened.page.get_by_role("link", name="API").click()
    opened.says("#operations", f"curl {embedded.url}/inner/draw/v1/images/generations")
    assert opened.page.url == f"{embedded.url}/inner/draw/docs"
    opened.says("#base", f"{embedded.url}/inner/draw/v1")
    opened.page.get_by_role("link", name="Imagine Flash").click()
    opened.page.wait_for_url(f"{embedded.url}/inner/draw/")


def test_where_the_server_wants_a_key_the_lines_have_one(tmp_path: Path, start_server, open_page, embedded) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef-key")
    locked = open_page(start_server("--api-key-file", tmp_path / "keys").url).go("docs")
    locked.says("#operations", '/v1/models -H "Authorization: Bearer KEY"')
    lines = locked.page.locator("pre").all_inner_texts()
    assert [("Bearer KEY" in line) == ("/v1/" in line) for line in lines] == [True] * 7
    plain = open_page(embedded.url).go("docs")
    plain.says("#operations", "/v1/models")
    assert "Bearer" not in plain.page.locator("main").inner_text()
