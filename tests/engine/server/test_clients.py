"""Clients that people have, as they are: OpenAI's, LangChain's, A1111's, and what Open WebUI and LibreChat send."""

import base64
import concurrent.futures
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.server import ServerSettings, create_app
from imagine_flash.folders.manifests import Guidance
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.tests.engine.server.conftest import picture, png


@pytest.mark.parametrize(
    ("size", "drawn"),
    [("1024x1024", (1024, 1024)), ("1792x1024", (1792, 1024)), ("auto", (64, 64)), ("64x64", (64, 64))],
)
def test_another_size_is_drawn_at_the_models_and_scaled(
    client: openai.OpenAI, size: str, drawn: tuple[int, int]
) -> None:
    """It was refused, and every client's default is one of OpenAI's sizes."""
    raw = client.images.with_raw_response.generate(prompt="a cat", size=size, extra_body={"seed": 7})  # type: ignore[arg-type]
    body = raw.parse()
    assert body.data and picture(body.data[0].b64_json or "").size == drawn
    assert body.size == f"{drawn[0]}x{drawn[1]}"  # type: ignore[comparison-overlap]
    assert raw.headers.get("x-drawn-size") == (None if drawn == (64, 64) else "64x64")
    assert any("scaled to" in one for one in body.warnings) == (drawn != (64, 64))  # type: ignore[attr-defined]


def test_a_picture_has_a_url_for_an_hour(client: openai.OpenAI, http: httpx.Client) -> None:
    got = client.images.generate(
        prompt="a cat", model="dall-e-2", n=2, extra_body={"seed": 7}
    )  # where OpenAI's default is a URL
    assert got.data is not None and all(one.url and one.b64_json is None for one in got.data)
    first, second = (http.get(one.url or "") for one in got.data)
    assert first.headers["content-type"] == "image/png" and picture(first.content).size == (64, 64)
    assert first.content != second.content
    same = client.images.generate(prompt="a cat", model="gpt-image-1", extra_body={"seed": 7})
    assert same.data and base64.b64decode(same.data[0].b64_json or "") == first.content
    assert http.get("/pictures/none.png").status_code == 404


@pytest.mark.parametrize(
    "model", ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "chatgpt-image-latest", None]
)
def test_openais_models_are_this_one(client: openai.OpenAI, model: str | None) -> None:
    assert client.images.generate(prompt="a cat", model=model).data


def test_an_alias_is_this_model_and_pictures_come_in_the_answer_where_that_is_set(tiny_artifact: Path) -> None:
    settings = ServerSettings(alias=("flux", "my/sdxl"), image_urls="data")
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine, TestClient(create_app(engine, settings)) as http:
        body = {"prompt": "a cat", "steps": 1, "response_format": "url", "output_format": "webp"}
        answer = http.post("/v1/images/generations", json={**body, "model": "flux"})
        kind, data = answer.json()["data"][0]["url"].split(",")
        assert kind == "data:image/webp;base64" and picture(data).size == (64, 64)
        for name in ("flux", "my/sdxl", "my%2Fsdxl"):  # one with a slash was not found
            assert http.get(f"/v1/models/{name}").json()["id"] == "tiny"
        refused = http.post("/v1/images/generations", json={**body, "model": "sd3"})
        assert refused.status_code == 404 and "no model 'sd3'; this server has 'tiny'" in refused.text


def test_a_slash_too_many_leads_nowhere(http: httpx.Client) -> None:
    """The server redirected to whatever host the request named."""
    answer = http.post("/v1/images/generations/", json={"prompt": "a cat"}, headers={"host": "evil.example"})
    assert answer.status_code == 404 and "location" not in answer.headers and "evil" not in answer.text


def test_what_is_ignored_is_named(client: openai.OpenAI) -> None:
    raw = client.images.with_raw_response.generate(
        prompt="a cat",
        quality="hd",
        style="vivid",
        background="transparent",
        moderation="low",
        user="somebody",
        extra_body={"guidance_scale": 7.5, "negative_prompt": "blurry", "num_inference_steps": 2, "seed": -1},
    )
    ignored = set(raw.headers["x-ignored"].split(", "))
    assert ignored == {"quality", "style", "background", "moderation", "user", "guidance_scale", "negative_prompt"}
    assert raw.parse().steps == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"steps": 1, "num_inference_steps": 2}, "num_inference_steps"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 50, "output_format": "webp"}, ""),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 2, "stream": True, "response_format": "url"}, "response_format"),
    ],
)
def test_so_is_what_has_no_effect_beside_the_other_fields(
    http: httpx.Client, fields: dict[str, Any], ignored: str
) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "a cat", **fields})
    assert answer.status_code == 200 and answer.headers.get("x-ignored", "") == ignored


def test_nulls_are_absent(http: httpx.Client) -> None:
    names = ("model", "n", "size", "response_format", "output_format", "user", "seed", "steps", "stream", "quality")
    answer = http.post("/v1/images/generations", json={"prompt": "a cat", **dict.fromkeys(names)})
    assert answer.status_code == 200, answer.text


def test_compression_is_that_of_the_file(client: openai.OpenAI) -> None:
    def size(quality: int) -> int:
        got = client.images.generate(
            prompt="a cat", output_format="jpeg", output_compression=quality, extra_body={"seed": 7}
        )
        assert got.data
        return len(got.data[0].b64_json or "")

    assert size(5) < size(95)


def test_a_stream_of_events_ends_with_the_picture(client: openai.OpenAI) -> None:
    whole = client.images.generate(prompt="a cat", extra_body={"seed": 7})
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=1, extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert whole.data and events[-1].b64_json == whole.data[0].b64_json != events[0].b64_json
    (only,) = client.images.generate(prompt="a cat", stream=True, extra_body={"seed": 7})
    assert only.b64_json == events[-1].b64_json
    start = png(np.full((64, 64, 3), 90, np.uint8))
    for strength, kinds in (
        (1, ["partial_image", "completed"]),
        (0.75, ["completed"]),
    ):  # one step would hide the start
        fields = {"seed": 7, "strength": strength}
        edited = client.images.edit(image=start, prompt="a cat", stream=True, partial_images=2, extra_body=fields)
        assert [event.type for event in edited] == [f"image_edit.{kind}" for kind in kinds]
    with pytest.raises(openai.BadRequestError, match="steps must be"):
        client.images.generate(prompt="a cat", stream=True, extra_body={"steps": 9})


def test_a_long_prompt_is_cut_with_a_warning(client: openai.OpenAI) -> None:
    got = client.images.generate(prompt="a cat " * 2000, extra_body={"seed": 7})
    assert any("longer than this model reads" in one for one in got.warnings)  # type: ignore[attr-defined]


def test_many_calls_at_once_with_the_clients_own_retries(start_server, tiny_artifact: Path) -> None:
    """Most of them failed: all were told to come again in a second, and met the same queue."""
    server = start_server("--model", tiny_artifact, "--backend", "onnxruntime", "--max-queue", "32")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        def draw(seed: int) -> bool:
            try:
                return bool(client.images.generate(prompt="a cat", extra_body={"seed": seed}).data)
            except openai.RateLimitError:
                return False

        with concurrent.futures.ThreadPoolExecutor(150) as pool:
            assert sum(pool.map(draw, range(150))) >= 145


GENERATIONS, EDITS, TXT2IMG = "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img"
ONE = {"prompt": "a cat", "n": 1}
VIVID = {"quality": "standard", "style": "vivid"}
AUTO = {"quality": "auto", "size": "auto"}
GPT = {"model": "gpt-image-1", **ONE, **AUTO, "background": "auto", "output_format": "webp", "output_compression": 100}
SENT: dict[str, tuple[str, dict[str, Any]]] = {
    "Open WebUI": (GENERATIONS, {**ONE, "model": "dall-e-3", "size": "1024x1024", "response_format": "b64_json"}),
    "Open WebUI, GPT Image": (GENERATIONS, {**ONE, "model": "gpt-image-1.5", "size": "512x512"}),
    "Open WebUI, Azure": (f"{GENERATIONS}?api-version=2025-04-01", {**ONE, "model": "dall-e-2", "size": "256x256"}),
    "Open WebUI, A1111": (
        TXT2IMG,
        {"prompt": "a cat", "batch_size": 1, "width": 512, "height": 512, "steps": 50, "negative_prompt": "blurry"},
    ),
    "LibreChat": (GENERATIONS, {**ONE, **VIVID, "model": "dall-e-3", "size": "1024x1792"}),
    "LibreChat, GPT Image": (GENERATIONS, GPT),
    "LibreChat, A1111": (
        TXT2IMG,
        {"prompt": "a cat", "negative_prompt": "", "cfg_scale": 4.5, "steps": 22, "width": 1024, "height": 1024},
    ),
}


@pytest.mark.parametrize("name", SENT)
def test_what_chat_programs_send(http: httpx.Client, name: str) -> None:
    """As their sources have it: open_webui/routers/images.py; DALLE3.js, OpenAIImageTools.js and StableDiffusion.js of
    api/app/clients/tools/structured."""
    path, body = SENT[name]
    answer = http.post(path, json=body, headers={"authorization": "" if path == TXT2IMG else "Bearer none"})
    assert answer.status_code == 200, answer.text
    if path == TXT2IMG:
        (file,), info = map(base64.b64decode, answer.json()["images"]), json.loads(answer.json()["info"])
        assert info["infotexts"][0].startswith("a cat\n") and isinstance(info["seed"], int)
        assert (info["width"], info["height"]) == (body["width"], body["height"])
    else:
        (one,) = answer.json()["data"]
        file = http.get(one["url"]).content if "url" in one else base64.b64decode(one["b64_json"])
    size = body.get("size", f"{body.get('width')}x{body.get('height')}")
    assert picture(file).size == ((64, 64) if size == "auto" else tuple(map(int, size.split("x"))))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("image", {"model": "dall-e-2", **ONE, "size": "512x512", "response_format": "b64_json"}),
        ("image[]", {"model": "gpt-image-1", **ONE, "background": "auto"}),
        ("image[]", {"model": "gpt-image-1", "prompt": "a cat", **AUTO}),
    ],
    ids=["Open WebUI", "Open WebUI, GPT Image", "LibreChat"],
)
def test_what_chat_programs_send_to_edit(http: httpx.Client, name: str, form: dict[str, Any]) -> None:
    file = (name, ("0b5c.png", png(np.full((64, 64, 3), 90, np.uint8)), "image/png"))
    answer = http.post(EDITS, files=[file], data={key: str(value) for key, value in form.items()})
    assert answer.status_code == 200 and answer.json()["data"][0]["b64_json"]


def test_the_name_in_an_address_is_one_word(client: openai.OpenAI) -> None:
    """Programs look for \\w+\\.png in it, which a name with a minus before its point has not."""
    got = client.images.generate(prompt="a cat", n=64, model="dall-e-2", extra_body={"steps": 1})
    assert len(got.data or ()) == 64
    assert all(re.search(r"/pictures/\w+\.png$", one.url or "") for one in got.data or ())


def test_langchains_wrapper(server) -> None:
    wrapper = pytest.importorskip(
        "langchain_community.utilities.dalle_image_generator", reason="langchain-community is not installed"
    )
    urls = wrapper.DallEAPIWrapper(base_url=f"{server.url}/v1", api_key="none", n=2).run("a cat").split("\n")
    assert [picture(httpx.get(url).content).size for url in urls if url] == [(1024, 1024)] * 2


NODE = """
import OpenAI, { toFile } from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none" });
const one = await client.images.generate({ model: "gpt-image-1", prompt: "a cat", size: "1024x1024" });
const url = await client.images.generate({ model: "dall-e-3", prompt: "a cat" });
const events = [];
const stream = await client.images.generate({ prompt: "a cat", stream: true, partial_images: 1 });
for await (const event of stream) events.push(event.type);
const file = await toFile(Buffer.from(one.data[0].b64_json, "base64"), "a.png", { type: "image/png" });
const edit = await client.images.edit({ image: file, prompt: "a cat" });
console.log(JSON.stringify([one.data[0].b64_json.length > 1000, url.data[0].url, events, edit.data[0].b64_json.length > 1000]));
"""


@pytest.mark.slow
def test_openais_client_for_node(server, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or subprocess.run([npm, "install", "--prefix", tmp_path, "openai"], capture_output=True).returncode:
        pytest.skip("needs npm and its registry")
    (tmp_path / "draw.mjs").write_text(NODE)
    done = subprocess.run(
        ["node", "draw.mjs", f"{server.url}/v1"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f'true,"{server.url}/pictures/' in done.stdout and done.stdout.strip().endswith(",true]")
    assert '["image_generation.partial_image","image_generation.completed"]' in done.stdout


def test_a_client_of_a1111(server, tiny_artifact: Path) -> None:
    """webuiapi with its defaults: 20 steps, 512 x 512, a sampler that is not known here."""
    webuiapi = pytest.importorskip("webuiapi", reason="webuiapi is not installed")
    api = webuiapi.WebUIApi(host="127.0.0.1", port=server.port)
    assert [one["title"] for one in api.get_sd_models()] == ["tiny"] == [api.util_get_current_model()]
    api.util_set_model("tiny")
    drawn = api.txt2img(prompt="a cat", negative_prompt="blurry", seed=7, batch_size=2)
    assert [one.size for one in drawn.images] == [(512, 512)] * 2 and drawn.info["steps"] == 3
    assert drawn.info["all_seeds"] == [7, 8] and "Seed: 8" in drawn.info["infotexts"][1]
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        expected = engine.generate(GenerateRequest(prompt="a cat", seed=7, steps=3)).images[0]
    own = api.txt2img(prompt="a cat", seed=7, width=64, height=64).image
    assert np.abs(np.asarray(own).astype(int) - expected).max() <= 1
    start = Image.fromarray(np.full((64, 64, 3), (255, 165, 0), np.uint8))
    mask = Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (32, 0))))
    edited = api.img2img([start], prompt="a cat", mask_image=mask, width=64, height=64, denoising_strength=1, seed=7)
    pixels = np.asarray(edited.image)
    assert np.array_equal(pixels[:, :32], np.asarray(start)[:, :32]) and pixels[:, 32:].std() > 0
    assert api.get_progress()["progress"] == 0 and api.util_get_sampler_names()
    api.util_wait_for_ready()


def test_an_empty_mask_is_none(http: httpx.Client) -> None:
    """Some clients of A1111's always send one; it was refused."""
    start = base64.b64encode(png(np.full((64, 64, 3), 90, np.uint8))).decode()
    asked = {"prompt": "a cat", "seed": 7, "init_images": [start], "width": 64, "height": 64}
    for route in ({}, {"inpainting_mask_invert": 1}):
        answers = [http.post("/sdapi/v1/img2img", json=asked | route | mask) for mask in ({}, {"mask": ""})]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["images"] == answers[1].json()["images"]


def test_the_other_door_says_what_is_wrong(http: httpx.Client) -> None:
    for path, body, status, says in (
        ("txt2img", {"prompt": ""}, 400, "prompt must be"),
        ("txt2img", {"prompt": "a cat", "width": 9999}, 400, "width: Input should be less than or equal to 4096"),
        (
            "txt2img",
            {"prompt": "a cat", "n_iter": 8, "batch_size": 9},
            400,
            "n_iter: at most 64 pictures with batch_size",
        ),
        ("txt2img", {"prompt": "a cat", "n_iter": 60, "width": 1000, "height": 1000}, 400, "too much at once"),
        ("txt2img", {"prompt": "a cat", "rubbish": 70_000 * [[]]}, 413, "more than 65,536 fields and items"),
        ("png-info", {}, 404, "there is no POST /sdapi/v1/png-info; /docs lists what there is"),
        ("img2img", {"prompt": "a cat"}, 400, "init_images"),
        ("img2img", {"prompt": "a cat", "init_images": ["*"]}, 400, "send a picture in base64"),
        ("img2img", {"prompt": "a cat", "init_images": ["AAAA"]}, 400, "image is no PNG"),
        ("options", {"sd_model_checkpoint": "flux"}, 404, "no model 'flux'"),
    ):
        answer = http.post(f"/sdapi/v1/{path}", json=body)
        assert answer.status_code == status and says in answer.json()["error"]["message"], answer.text
    odd = {
        "prompt": "a cat",
        "seed": None,
        "tiling": False,
        "enable_hr": True,
        "width": 64,
        "height": 64,
        "名": 1,
        "n": float("nan"),
    }
    answer = http.post("/sdapi/v1/txt2img", content=json.dumps(odd), headers={"content-type": "application/json"})
    assert answer.status_code == 200 and answer.headers["x-ignored"] == "enable_hr, n"
    said = {name: value for name, value in answer.json().items() if name != "images"}  # whose base64 may spell it
    assert "NaN" not in json.dumps(said) and answer.json()["parameters"]["width"] == 64
    full_width = http.post("/v1/images/generations", json={"prompt": "a cat", "size": "\uff14x\uff14"})
    assert full_width.status_code == 400 and "size must be WIDTHxHEIGHT" in full_width.text


def test_guidance_and_negative_prompts_where_the_model_takes_them(tiny_artifact: Path, tmp_path: Path) -> None:
    """They were ignored, whatever the model. A scale that no float holds was a fault of the server, one too large was called
    `guidance`, and a negative prompt of 4,001 characters was refused, though one is cut where the model ends."""
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "guided"))
    manifest = read_artifact_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"guidance": Guidance(default=2.0, range=(1, 5))}))
    with Engine.load(folder, backend="onnxruntime") as engine, TestClient(create_app(engine)) as http:

        def draw(path: str = "/v1/images/generations", **fields: object) -> Any:  # httpx's, or its successor's
            return http.post(path, json={"prompt": "a cat", "seed": 7, **fields})

        plain, strong = draw(), draw(guidance_scale=4, negative_prompt="a dog", quality="hd")
        assert strong.headers["x-ignored"] == "quality"
        assert plain.json()["data"] != strong.json()["data"]
        expected = engine.generate(GenerateRequest(prompt="a cat", seed=7, guidance=4, negative_prompt="a dog"))
        assert (
            np.abs(np.asarray(picture(strong.json()["data"][0]["b64_json"])).astype(int) - expected.images[0]).max() < 2
        )
        other = draw("/sdapi/v1/txt2img", cfg_scale=4, negative_prompt="a dog", width=64, height=64).json()
        assert other["images"][0] == strong.json()["data"][0]["b64_json"]
        assert draw(guidance_scale=1, negative_prompt="a dog").headers["x-ignored"] == "negative_prompt"
        known = http.get("/v1/models").json()["data"][0]["guidance"]
        assert known == {"default": 2.0, "range": [1.0, 5.0], "embedded": False}

        def edit(**fields: str) -> Any:
            start = {"image": png(np.full((64, 64, 3), 90, np.uint8))}
            return http.post("/v1/images/edits", data={"prompt": "a cat", "seed": "7", **fields}, files=start)

        with http.websocket_connect("/v1/stream") as stream:
            assert stream.receive_json()["guidance"]
            stream.send_json({"seq": 1, "prompt": "a cat", "seed": 7, "format": "png", "guidance_scale": 4})
            assert b'"ignored": []' in stream.receive_bytes()
            stream.send_json({"seq": 2, "prompt": "a cat", "guidance_scale": 1, "negative_prompt": "a dog"})
            assert b'"ignored": ["negative_prompt"]' in stream.receive_bytes()

            long = "a dog " * 300  # the prompt was said to be too long
            stream.send_json({"seq": 3, "prompt": "a cat", "guidance_scale": 4, "negative_prompt": long})
            header = stream.receive_bytes()
            assert b'"cut": ""' in header and b'"cut_negative": "a dog' in header
        (warning,) = draw(guidance_scale=4, negative_prompt=long).json()["warnings"]
        assert warning.startswith("the negative prompt is longer than this model reads; left out: a dog")
        assert draw(guidance_scale=4, negative_prompt="a dog " * 2000).status_code == 200
        for scale in ("1" + "0" * 400, "50.1", "51", "-1", "NaN", "Infinity"):
            asked = f'{{"prompt": "a cat", "guidance_scale": {scale}}}'
            answer = http.post("/v1/images/generations", content=asked, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "guidance_scale", answer.text
            assert "guidance_scale: must be 0 to 50, got" in answer.text
        assert edit(guidance_scale="51").status_code == 400 and edit(guidance_scale="50").status_code == 200

        form = edit(guidance_scale="4", negative_prompt="a dog")  # a form's fields are texts
        assert "x-ignored" not in form.headers and form.json()["data"] != edit().json()["data"]
