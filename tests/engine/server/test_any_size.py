"""A server of an artifact of any size: the size that is asked for is the one that is drawn, by every door."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from imagine_flash.export import ExportOptions, export_student
from imagine_flash.tests.engine.server.conftest import ServerProcess, picture
from imagine_flash.tests.engine.server.test_stream import ask, open_stream, read

pytestmark = pytest.mark.slow
ANY = {"smallest": 32, "largest": 96, "multiple": 16}


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., ServerProcess], tiny_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> ServerProcess:
    folder = tmp_path_factory.mktemp("any") / "artifact"
    free: Any = {"any_size": (32, 96), "steps": (1,), "batch": (1, 2), "image_encoder": False}
    manifest = export_student(tiny_student, folder, options=ExportOptions(precision="fp16", **free))
    assert manifest.parity["stages_1"]["psnr"] >= 35  # in half precision too
    return start_server("--model", folder, "--backend", "onnxruntime")


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.mark.parametrize(
    ("asked", "drawn"), [("96x48", None), ("64x64", None), ("100x40", "96x32"), ("256x256", "96x96"), ("auto", None)]
)
def test_openais_route_draws_it_or_the_nearest(http: httpx.Client, asked: str, drawn: str | None) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "a cat", "size": asked, "seed": 3})
    assert answer.status_code == 200, answer.text
    size = picture(answer.json()["data"][0]["b64_json"]).size
    assert "x".join(map(str, size)) == ("64x64" if asked == "auto" else asked)
    assert answer.headers.get("x-drawn-size") == drawn


def test_the_older_api_draws_it(http: httpx.Client) -> None:
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "width": 48, "height": 80, "steps": 1})
    assert picture(answer.json()["images"][0]).size == (48, 80)


def test_the_model_says_so(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["any_size"] == ANY and model["sizes"] == ["64x64"]


def test_a_stream_draws_it_and_refuses_others(server: ServerProcess) -> None:
    with open_stream(server) as socket:
        assert read(socket)[0]["any_size"] == ANY
        for seq, size in enumerate(("80x48", "32x96", "64x64"), start=1):
            ask(socket, seq, size=size)
            header, pixels = read(socket)
            assert pixels is not None and header["size"] == size == f"{pixels.shape[1]}x{pixels.shape[0]}"
        ask(socket, 9, size="72x64")
        refused, _ = read(socket)
        message = "this engine draws sides of 32 to 96 in multiples of 16, got 72x64; try 64x64"
        assert refused["error"]["message"] == message and refused["error"]["param"] == "size"


def test_the_page_offers_shapes_and_keeps_the_one_of_an_address(server: ServerProcess, open_page: Any) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs playwright")
    opened = open_page(server.url).go("#prompt=a+cat&seed=3&size=96x32")
    page = opened.page
    drawn = """([width, height]) => {
      const image = document.querySelector("#picture img");
      return image?.naturalWidth === width && image.naturalHeight === height;
    }"""
    page.wait_for_function(drawn, arg=[96, 32])
    offered = page.locator("#size option").evaluate_all("(all) => all.map((one) => one.value)")
    assert offered == ["64x64", "80x48", "48x80", "96x32"]
    page.select_option("#size", "48x80")
    page.wait_for_function(drawn, arg=[48, 80])
    assert "size=48x80" in page.evaluate("location.hash")
    assert "--width 48 --height 80" in page.locator("#command").inner_text()
    assert opened.console == []
