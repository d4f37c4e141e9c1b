"""What the page says where there is no connection, and how it comes back: a server that loads, dies, refuses or wants a key."""

import contextlib
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.slow

KEY = "0123456789abcdef-key"


def test_a_server_that_dies_is_missed_and_found_again(embedded, open_page) -> None:
    opened = open_page(embedded.url).go()
    opened.shows("a fox on a pink background")
    embedded.kill()
    opened.says("#trouble", "The server does not answer")
    opened.says("#state", "no connection")
    opened.page.fill("#prompt", "a dog")
    embedded.start(0)
    opened.shows("a dog")
    opened.says("#state", "ready")
    assert not opened.page.locator("#trouble").is_visible()
    assert not [line for line in opened.console if "uncaught" in line]


def test_what_was_typed_without_a_connection_is_not_waited_for(embedded, open_page) -> None:
    """Once the server was back, the page said that it had been drawing for as long as it was away."""
    opened, phase, sockets = open_page(embedded.url), ["draws"], []

    def between(socket: Any) -> None:
        if phase[0] == "away":
            socket.close(code=1013, reason="the model is still being loaded")
            return
        server = socket.connect_to_server()
        sockets.append(socket)
        if phase[0] == "slow":
            server.on_message(lambda message: socket.send(message) if '"ready"' in str(message) else None)

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().shows("a fox on a pink background")
    phase[0] = "away"
    sockets[0].close(code=1012)
    opened.says("#trouble", "The model is being loaded")
    opened.page.fill("#prompt", "a dog")
    opened.page.wait_for_timeout(2500)
    phase[0] = "slow"
    opened.says("#state", "drawing")
    assert "drawing," not in opened.page.locator("#state").inner_text()


def test_a_connection_that_something_between_forgot_is_made_anew(embedded, open_page) -> None:
    """The page said for good that the server says nothing, though a new connection would have been answered."""
    opened, sockets, forgotten = open_page(embedded.url), [], []

    def between(socket: Any) -> None:
        server = socket.connect_to_server()
        sockets.append(socket)
        server.on_message(lambda message: None if socket in forgotten else socket.send(message))

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().shows("a fox on a pink background")
    forgotten.extend(sockets)
    opened.page.fill("#prompt", "a cat")
    opened.says("#trouble", "The server has said nothing for two seconds")
    opened.shows("a cat")
    assert len(sockets) == 2 and not opened.page.locator("#trouble").is_visible()
    forgotten.extend(sockets)
    opened.page.fill("#prompt", "a dog")
    opened.says("#trouble", "The server has said nothing for two seconds")
    opened.page.click("#again")
    opened.shows("a dog")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("the model is still being loaded", "The model is being loaded"),
        ("8 streams are open, at most 8 may be", "Too many pages are open at this server"),
    ],
)
def test_of_a_server_that_draws_later_the_page_says_why(embedded, open_page, reason: str, said: str) -> None:
    opened, closed = open_page(embedded.url), []

    def between(socket: Any) -> None:
        if len(closed) < 2:
            closed.append(time.monotonic())
            socket.close(code=1013, reason=reason)
        else:
            socket.connect_to_server()

    opened.page.route_web_socket(re.compile("/v1/stream"), between)
    opened.go().says("#trouble", said)
    opened.shows("a fox on a pink background")
    opened.says("#state", "ready")
    assert closed[1] - closed[0] > 0.2, "it waits before it tries again"


@contextmanager
def renaming_proxy(port: int) -> Iterator[str]:
    """The address of one that passes everything on, with another Host, as nginx does unless told otherwise."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data.replace(f"Host: {address}".encode(), b"Host: drawing:80"))
            target.shutdown(socket.SHUT_WR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as inner:
                back = threading.Thread(target=copy, args=(inner, self.request), daemon=True)
                back.start()
                copy(self.request, inner)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        address = f"127.0.0.1:{proxy.server_address[1]}"
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://{address}"
        proxy.shutdown()


def test_behind_a_proxy_under_another_name(start_server, tiny_artifact: Path, open_page) -> None:
    """It said that WebSockets may not pass, where the server had refused the page's origin: it answers GET to anybody."""
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime")
    with renaming_proxy(server.port) as url:
        opened = open_page(url).go()
        opened.says("#trouble", f"Pages of {url} may not call this server; --allow-origin lets them.")
        opened.says("#state", "not allowed")
        server.stop()
        opened.says("#state", "no connection")
        server.options += ("--allow-origin", url)
        server.start()
        opened.shows("a fox on a pink background")
        opened.says("#state", "ready")
        assert not opened.page.locator("#trouble").is_visible()
        opened.context.close()
    server.stop()


@pytest.mark.parametrize(
    ("status", "state", "said"),
    [
        (None, "no connection", "Something between may not pass on WebSockets"),
        (403, "not allowed", "The server does not let this page draw."),
        (502, "no connection", "The server does not answer"),
        (503, "loading the model", "The model is being loaded"),
    ],
)
def test_why_there_is_no_connection(embedded, open_page, status: int | None, state: str, said: str) -> None:
    """status: of something before the server; None: the server's own answer."""
    opened = open_page(embedded.url)
    opened.page.add_init_script(
        """const Real = WebSocket;
        window.WebSocket = class extends Real { constructor(url, offered) { super(`${url}/not`, offered); } };"""
    )
    if status:
        probe = re.compile("/v1/images/generations")
        opened.page.route(probe, lambda route: route.fulfill(status=status, body="<h1>No</h1>"))
    opened.go().says("#trouble", said)
    opened.says("#state", state)
    assert opened.page.locator("#again").is_visible() == (status != 503)


def test_the_key_field(tmp_path: Path, start_server, open_page) -> None:
    (tmp_path / "keys").write_text(KEY)
    server = start_server("--api-key-file", tmp_path / "keys")
    opened = open_page(server.url, viewport={"width": 390, "height": 844}).go()
    page = opened.page
    opened.says("#trouble", "those who have a key")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#four")  # it said what was wrong in the place of the field
    playwright.expect(page.locator("#four")).to_be_enabled()
    assert page.locator("#key").is_visible()
    page.focus("#key")
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


def test_four_seeds_that_nothing_of_the_api_answers(embedded, open_page) -> None:
    """It said `Unexpected token '<'` of a proxy's page, and `Failed to fetch` of a network that is gone."""
    opened = open_page(embedded.url).go()
    opened.shows("a fox on a pink background")
    api = re.compile("/v1/images/generations")
    opened.page.route(api, lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    opened.page.click("#four")
    opened.says("#trouble", "Something between here and the server answered with 502.")
    opened.page.route(api, lambda route: route.abort())
    opened.page.click("#four")
    opened.says("#trouble", "The server does not answer.")
