"""The equivalences of the engine: routes, batches, repetitions and threads all draw the same picture."""

import asyncio
import os
import re
import select
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine_flash.core.errors import ArtifactError, EngineError, PlanError, RequestError
from imagine_flash.core.noise import initial_noise
from imagine_flash.engine import Engine, GenerateRequest


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest, tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend=request.param) as engine:
        yield engine


def images(engine: Engine, **request) -> np.ndarray:
    return engine.generate(GenerateRequest(**{"prompt": "a cat", "steps": 3, "seed": 7, **request})).images


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_both_routes_draw_the_same(engine: Engine, tiny_artifact: Path, steps: int) -> None:
    whole = Engine.load(tiny_artifact, route="sampler")
    first, second = images(engine, steps=steps, count=3), images(whole, steps=steps, count=3)
    assert first.shape == (3, 64, 64, 3) and first.dtype == np.uint8
    assert np.abs(first.astype(int) - second.astype(int)).max() <= 1
    assert len(np.unique(first)) > 2


def test_a_batch_is_its_pictures_one_by_one(engine: Engine) -> None:
    batch = images(engine, count=11)  # more than one chunk
    alone = [images(engine, seed=7 + i)[0] for i in range(11)]
    assert np.abs(batch.astype(int) - np.stack(alone).astype(int)).max() <= 1


def test_a_request_is_untouched_by_the_one_before(engine: Engine, tiny_artifact: Path) -> None:
    before = images(engine)
    other = images(engine, prompt="a dog on pink", seed=8, steps=2)
    assert np.array_equal(images(engine), before)
    assert not np.array_equal(other, before)
    assert np.array_equal(images(Engine.load(tiny_artifact, backend=engine.backend.name)), before)


def test_threads_do_not_mix(engine: Engine) -> None:
    expected = [images(engine, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda seed: images(engine, seed=seed), range(8)))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(expected, got, strict=True))


def test_the_engine_equals_the_torch_student(engine: Engine, tiny_student: Path) -> None:
    """The artifact through the runtime against the student folder in torch, from the same noise, for every plan."""
    import torch

    from imagine_flash.core.update import update_table
    from imagine_flash.distill.models import load_model
    from imagine_flash.folders.reading import read_student_manifest

    model, manifest = load_model(tiny_student), read_student_manifest(tiny_student)
    noise = torch.from_numpy(initial_noise(7, 2, model.latent_shape))
    for steps, plan in manifest.step_plans.items():
        table = update_table(model.denoiser.schedule, plan, "v_prediction", noise_correction=manifest.noise_correction)
        expected = model.decode(model.sample(noise, model.embed(["a cat"] * 2), table))
        assert np.abs(images(engine, steps=steps, count=2).astype(int) - expected.astype(int)).max() <= 1


def test_timings_and_words(engine: Engine) -> None:
    result = engine.generate(GenerateRequest(prompt="A house, yak, Zebra", seed=1))
    assert result.steps == 3 and result.seed == 1
    assert result.unknown_words == ["yak", "zebra"]
    stages = result.timings.stages()
    assert {"tokenize", "encode", "denoise", "decode", "total"} <= set(stages) and len(result.timings.denoise) == 3
    assert 0 < sum(stages.values()) - stages["total"] <= stages["total"] == result.timings.total


def test_noise_is_a_function_of_the_seed() -> None:
    batch = initial_noise(5, 4, (4, 8, 8))
    assert batch.dtype == np.float32 and np.array_equal(batch[2], initial_noise(7, 1, (4, 8, 8))[0])
    assert abs(batch.mean()) < 0.1 and abs(batch.std() - 1) < 0.1
    assert batch[0, 0, 0, 0] == pytest.approx(initial_noise(5, 1, (1, 1, 1)).item())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": ""}, "prompt must be"),
        ({"prompt": "  "}, "prompt must be"),
        ({"prompt": 3}, "prompt must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": "two"}, "'two'"),
        ({"steps": 2.5}, "2.5"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": 2**63 - 2, "count": 3}, f"seed must be at most {2**63 - 3} for 3 pictures, whose seeds follow it"),
        ({"count": 0}, "count must be a whole number from 1 to 64, got 0"),
        ({"count": 10_000}, "got 10000"),
        ({"height": 0}, "height must be a whole number of pixels, got 0"),
        ({"width": "64"}, "width must be a whole number of pixels, got '64'"),
        ({"cuont": 1}, "no 'cuont'"),
        ({"prompt": "a \ud800 cat"}, "prompt must be a text"),
        ({"negative_prompt": "a \ud800 cat"}, "negative_prompt must be a text, got 'a \\ud800 cat'"),
    ],
)
def test_bad_requests(values: dict, says: str) -> None:
    with pytest.raises(RequestError) as error:
        GenerateRequest(**{"prompt": "a cat", **values})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_the_model_cannot_draw(engine: Engine, tiny_artifact: Path) -> None:
    with pytest.raises(PlanError, match=r"steps must be 1, 2 or 3, got 4"):
        engine.generate(GenerateRequest(prompt="a cat", steps=4))
    with pytest.raises(RequestError, match=r"draws 64x64 \(width x height\), got 96x64"):
        engine.generate(GenerateRequest(prompt="a cat", width=96))
    with pytest.raises(ArtifactError, match="no backend 'cuda'"):
        Engine.load(tiny_artifact, backend="cuda")
    with pytest.raises(ArtifactError, match="no route"):
        Engine.load(tiny_artifact, route="fast")  # type: ignore[arg-type]


def test_a_long_prompt_is_cut_and_says_so(engine: Engine) -> None:
    """It was refused, though every other server cuts."""
    long = engine.generate(GenerateRequest(prompt="a cat on pink " * 9, seed=7))
    words = ("a cat on pink " * 9).split()
    kept = len(words) - len(long.cut.split())
    assert 0 < kept < len(words) and long.cut == " ".join(words[kept:])
    short = engine.generate(GenerateRequest(prompt=" ".join(words[:kept]), seed=7))
    assert short.cut == "" and np.array_equal(long.images, short.images)
    one_more = engine.generate(GenerateRequest(prompt=" ".join(words[: kept + 1]), seed=7))
    assert one_more.cut == words[kept], "no more is cut than has to be"


def test_a_long_negative_prompt_is_cut_and_named(engine: Engine) -> None:
    """It was refused as a long prompt, whichever of the two it was; then cut, and the prompt blamed for it."""
    long, least = "a dog on pink " * 9, {"prompt": "a cat", "seed": 7, "guidance": 3.0}
    result = engine.generate(GenerateRequest(**least, negative_prompt=long))
    cut = result.cut_negative
    assert not result.cut and cut and long.strip().endswith(cut)
    kept = long.strip().removesuffix(cut).strip()
    short = engine.generate(GenerateRequest(**least, negative_prompt=kept))
    assert short.cut_negative == "" and np.array_equal(short.images, result.images)


def test_one_endless_word_is_cut_too(engine: Engine) -> None:
    result = engine.generate(GenerateRequest(prompt="\U0001f98a" * 500, seed=7))
    assert result.images.shape[0] == 1 and (result.cut or result.unknown_words)


def test_a_prompt_with_fields_is_a_request(engine: Engine, tiny_artifact: Path) -> None:
    """As pipelines of diffusers are called."""
    expected = images(engine, prompt="a cat", steps=2, seed=9)
    assert np.array_equal(engine.generate("a cat", steps=2, seed=9).images, expected)
    assert np.array_equal(engine.generate(prompt="a cat", steps=2, seed=9).images, expected)
    assert np.array_equal(engine.submit("a cat", steps=2, seed=9).result().images, expected)
    assert np.array_equal(asyncio.run(engine.agenerate("a cat", steps=2, seed=9)).images, expected)

    async def streamed() -> list[np.ndarray]:
        return [result.images async for result in engine.stream("a cat", steps=2, seed=9)]

    assert np.array_equal(asyncio.run(streamed())[-1], expected)


@pytest.mark.parametrize(
    "request_, fields, says",
    [
        ("a cat", {"step": 2}, "a request has no 'step'; it has prompt, steps, seed,"),
        ("a cat", {"steps": "two"}, "steps must be a whole number"),
        (
            GenerateRequest(prompt="a cat"),
            {"steps": 2, "seed": 1},
            "a GenerateRequest has its own steps, seed: give them",
        ),
        ({"prompt": "a cat"}, {}, "a request is a prompt or a GenerateRequest, got {'prompt': 'a cat'}"),
        (None, {}, "prompt must be "),
        (7, {}, "got 7"),
        ("a cat", {"prompt": "a dog"}, "two prompts, 'a cat' and 'a dog': give one"),
    ],
)
def test_what_is_no_prompt_with_fields(engine: Engine, request_: Any, fields: dict, says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        engine.generate(request_, **fields)


def test_numpys_numbers_are_numbers() -> None:
    request = GenerateRequest(
        prompt="a cat", steps=np.int64(2), seed=np.uint32(7), count=np.int8(1), timeout=np.float32(2)
    )
    assert request == GenerateRequest(prompt="a cat", steps=2, seed=7, count=1, timeout=2.0)


def test_requests_with_pictures_are_compared_by_them() -> None:
    """NumPy's == made it an error; and a request changed with the array that it was given."""
    pixels = np.full((64, 64, 3), 90, np.uint8)
    request = GenerateRequest(prompt="a cat", seed=7, image=pixels)
    same = GenerateRequest(prompt="a cat", seed=7, image=pixels.copy())
    pixels[:] = 0
    assert request == same and hash(request) == hash(same)
    assert request != GenerateRequest(prompt="a cat", seed=7, image=pixels)
    assert request != GenerateRequest(prompt="a cat", seed=7) != "a cat"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_engine_in_a_forked_process_says_so_instead_of_hanging(engine: Engine) -> None:
    engine.generate(GenerateRequest(prompt="a cat"))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine.submit(GenerateRequest(prompt="a cat"))
        except EngineError as error:
            os.write(write, str(error).encode())
        engine.close()
        os._exit(0)
    assert select.select([read], [], [], 20)[0], "it hangs"
    assert b"forked after the engine was loaded" in os.read(read, 1000)
    os.waitpid(child, 0)
    assert engine.generate(GenerateRequest(prompt="a cat")).images.any()


def test_seed_none_draws_one() -> None:
    seeds = {GenerateRequest(prompt="a cat", seed=None).seed for _ in range(4)}
    assert len(seeds) > 1


def test_a_hub_id_that_cannot_be_fetched_is_named(tiny_artifact: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"^nobody/nothing is no folder here and could not be fetched .*give the path of its folder"
    ):
        Engine.load("nobody/nothing")


def test_a_large_network_is_compiled_for_one_picture_and_draws_many(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch size took the weights once more: 3 x 3.5 GiB of a model of 1.2 G parameters."""
    library = pytest.importorskip("imagine_flash.engine.backends.openvino")
    pytest.importorskip("openvino")
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path))
    request = GenerateRequest(prompt="a fox", count=3, seed=5, steps=2)
    with Engine.load(tiny_artifact, backend="openvino", precision="fp32") as small:
        expected = small.generate(request).images
    monkeypatch.setattr(library, "LARGE", 0)
    with Engine.load(tiny_artifact, backend="openvino", precision="fp32") as large:
        large.warm_up()
        assert np.abs(large.generate(request).images.astype(int) - expected).max() <= 1
        assert {batch for _, batch in large.backend._graphs} == {1}  # type: ignore[attr-defined]
        assert large.max_batch == 1 and set(large.stats().batches) == {1}, "parts of a call would end together"


@pytest.mark.parametrize("route", ["stages", "sampler"])
def test_after_warming_up_no_request_loads_a_graph(tiny_artifact: Path, route: str) -> None:
    """Whole samplers were loaded from tokens, which no request calls; and not the encoder of pictures to edit."""
    with Engine.load(tiny_artifact, backend="onnxruntime", route=route) as engine:
        engine.warm_up()
        loaded = set(engine.backend._graphs)  # type: ignore[attr-defined]
        for steps in engine.steps:
            engine.generate(GenerateRequest(prompt="a fox", steps=steps, count=3))
        if engine.draws_from_pictures:
            engine.generate(GenerateRequest(prompt="a fox", image=np.full((64, 64, 3), 90, np.uint8)))
        assert set(engine.backend._graphs) == loaded  # type: ignore[attr-defined]
        assert engine.draws_from_pictures == (route == "stages")


def test_what_is_compiled_for_one_precision_is_not_read_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's key of a compiled model has no precision in it: after fp32, bf16 drew NaN in batches, and after bf16, fp32
    drew in bf16."""
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("needs a processor with bfloat16")
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path))
    request, drawn = GenerateRequest(prompt="a fox on pink", count=4, seed=5, steps=2), {}
    for which in ("fp32", "bf16", "fp32 again"):
        with Engine.load(backend="openvino", precision=which.partition(" ")[0]) as engine:
            drawn[which] = engine.generate(request).images.astype(int)
    assert np.array_equal(drawn["fp32"], drawn["fp32 again"])
    assert 0 < np.square(drawn["bf16"] - drawn["fp32"]).mean() < 255**2 / 10**3.0  # 30 dB
