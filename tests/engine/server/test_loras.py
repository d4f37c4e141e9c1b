"""LoRAs at every door of a real server: by the names that it was started with, never by a path; and on the command line."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.server.settings import ServerSettings
from imagine_flash.tests import pipelines
from imagine_flash.tests.commands import fails, run
from imagine_flash.tests.engine.server.conftest import ServerProcess, picture, png
from imagine_flash.tests.engine.server.test_stream import ask, open_stream, read
from imagine_flash.tests.loras import ATTENTION, write_lora

PROMPT = "a fox on pink"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("loras")
    targets = {"pixel": {"unet": ATTENTION, "text_encoder": ["q_proj"]}, "ink": {"unet": ["to_k", "conv1"]}}
    return {
        name: str(write_lora(root / name, pipelines.build_pipeline(), parts, seed=len(name)))
        for name, parts in targets.items()
    }


@pytest.fixture(scope="module")
def pictures(tiny_student: Path, loras: dict[str, str]) -> Iterator[Callable[..., np.ndarray]]:
    with Engine.load(tiny_student, backend="torch", device="cpu", loras=loras) as engine:
        yield lambda **lora: engine.generate(GenerateRequest(prompt=PROMPT, seed=7, lora=lora)).images[0].astype(int)


@pytest.fixture(scope="module")
def server(start_server: Callable[..., ServerProcess], tiny_student: Path, loras: dict[str, str]) -> ServerProcess:
    return start_server(
        "--model", tiny_student, "--lora", f"pixel={loras['pixel']}", "--lora", loras["ink"], seconds=120
    )


def is_drawn(data: str, expected: np.ndarray) -> bool:
    return bool(np.abs(np.asarray(picture(data)).astype(int) - expected).max() <= 1)


def test_the_image_api(client: openai.OpenAI, pictures: Callable[..., np.ndarray]) -> None:
    assert client.models.list().data[0].loras == ["ink", "pixel"]  # type: ignore[attr-defined]
    for lora in ({"pixel": 0.7, "ink": -0.3}, {"pixel": 1}, {}):
        got = client.images.generate(prompt=PROMPT, size="64x64", extra_body={"seed": 7, "lora": lora})  # type: ignore[arg-type]
        assert got.data and got.data[0].b64_json and is_drawn(got.data[0].b64_json, pictures(**lora))
    with pytest.raises(openai.BadRequestError, match=r"no LoRA 'pixl'; did you mean 'pixel'\?; it has ink, pixel"):
        client.images.generate(prompt=PROMPT, extra_body={"lora": {"pixl": 1}})


def test_a_forms_field_is_json(http: httpx.Client) -> None:
    start = {"image": ("a.png", png(np.full((64, 64, 3), 90, np.uint8)))}

    def edited(**fields: str) -> Any:
        given = {"prompt": PROMPT, "seed": "7", "strength": "1"} | fields
        return http.post("/v1/images/edits", data=given, files=start).json()

    plain, inked = (edited(**fields)["data"][0]["b64_json"] for fields in ({}, {"lora": '{"ink": 0.5}'}))
    assert plain != inked
    assert "no LoRA 'oil'" in edited(lora='{"oil": 1}')["error"]["message"]
    assert edited(lora="ink")["error"]["param"] == "lora"


def test_a1111s_clients_write_them_into_the_prompt(http: httpx.Client, pictures: Callable[..., np.ndarray]) -> None:
    known = http.get("/sdapi/v1/loras").json()
    assert [one["name"] for one in known] == ["ink", "pixel"] and "/" not in json.dumps(known)
    for text, lora in (
        (f"{PROMPT} <lora:pixel:0.7><lora:ink:-0.3>", {"pixel": 0.7, "ink": -0.3}),
        (f"<lora:pixel> {PROMPT}", {"pixel": 1.0}),
        (PROMPT, {}),
    ):
        asked = {"prompt": text, "seed": 7, "width": 64, "height": 64, "steps": 3}
        answer = http.post("/sdapi/v1/txt2img", json=asked).json()
        assert is_drawn(answer["images"][0], pictures(**lora))
        tags = "".join(f" <lora:{name}:{weight:g}>" for name, weight in sorted(lora.items()))
        assert json.loads(answer["info"])["infotexts"][0].startswith(f"{PROMPT}{tags}\nSteps: 3")


def test_a_stream_says_what_it_has_and_draws_with_it(
    server: ServerProcess, pictures: Callable[..., np.ndarray]
) -> None:
    with open_stream(server) as socket:
        ready, _ = read(socket)
        assert ready["loras"] == ["ink", "pixel"]
        ask(socket, 1, PROMPT, seed=7, lora={"pixel": 0.7})
        _, pixels = read(socket)
        assert pixels is not None and np.abs(pixels.astype(int) - pictures(pixel=0.7)).max() <= 1
        ask(socket, 2, PROMPT, lora={"oil": 1})
        refused, _ = read(socket)
        assert refused["error"]["param"] == "lora" and "no LoRA 'oil'" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("route", "fields", "says"),
    [
        ("/v1/images/generations", {"lora": {"pixel": 99}}, "lora must be a weight from -20 to 20 by name"),
        ("/v1/images/generations", {"lora": {"pixel": "1"}}, "lora.pixel: "),
        ("/v1/images/generations", {"lora": ["pixel"]}, "lora: "),
        ("/v1/images/generations", {"lora": {str(i): 1 for i in range(17)}}, "lora: "),
        ("/v1/images/generations", {"lora": {"/etc/passwd": 1}}, "no LoRA '/etc/passwd'; it has ink, pixel"),
        ("/sdapi/v1/txt2img", {"prompt": "a fox <lora:../oil:1>"}, "no LoRA '../oil'"),
        ("/sdapi/v1/txt2img", {"prompt": "a fox <lora:pixel:1:0.5>"}, "has more than one weight"),
        ("/sdapi/v1/txt2img", {"prompt": "a fox <lora:pixel:much>"}, "has no number as its weight"),
        ("/sdapi/v1/txt2img", {"prompt": "a fox <lora:pixel:nan>"}, "lora must be a weight"),
        ("/sdapi/v1/txt2img", {"prompt": "a <lora:pixel> fox <lora:pixel:2>"}, "'pixel' is asked for twice"),
        ("/sdapi/v1/txt2img", {"prompt": "<lora:pixel>"}, "prompt must be a text"),
    ],
)
def test_what_cannot_be_is_a_line(http: httpx.Client, route: str, fields: dict[str, Any], says: str) -> None:
    answer = http.post(route, json={"prompt": PROMPT, **fields})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and says in message and "\n" not in message


def test_settings_take_names_or_a_table() -> None:
    table = {"pixel": "a.safetensors", "ink": "owner/ink"}
    assert ServerSettings(lora=table).lora == table  # as YAML has it
    assert ServerSettings(lora=["pixel=a.safetensors", "owner/ink"]).lora == table  # type: ignore[arg-type]
    assert ServerSettings(lora=table).loading.loras == table


def test_a_command_that_cannot_be() -> None:
    assert "--lora: requests say the weight; leave out :0.8" in fails("serve", "--lora", "pixel=x.safetensors:0.8")
    assert "two LoRAs are called 'a'" in fails("serve", "--lora", "a=x", "--lora", "a=y")
    assert "two LoRAs are called 'a'" in fails("generate", "a cat", "--lora", "a=x", "--lora", "a=y")
    assert "got 30" in fails("generate", "a cat", "--lora", "a=x:30")
    assert "there is no LoRA x.safetensors; give a .safetensors file" in fails(
        "generate", "a cat", "--lora", "x.safetensors"
    )


def test_the_command_draws_with_them(
    tiny_student: Path, loras: dict[str, str], pictures: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "fox.png"
    typed = ["--lora", f"pixel={loras['pixel']}:0.7", "--lora", f"{loras['ink']}:-0.3"]
    done = run(
        "generate", PROMPT, "--model", tiny_student, "--device", "cpu", "--seed", "7", *typed, "-o", out, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lora"] == {"ink": -0.3, "pixel": 0.7} and "No LoRA keys" not in done.stderr
    assert is_drawn(base64.b64encode(out.read_bytes()).decode(), pictures(pixel=0.7, ink=-0.3))
    with Image.open(out) as drawn:
        assert drawn.info["parameters"].startswith(f"{PROMPT} <lora:ink:-0.3> <lora:pixel:0.7>\n")
