"""The equivalences of the engine: routes, batches, repetitions and threads all draw the same picture."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.core.errors import ArtifactError, PlanError, RequestError
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
    from imagine_flash.distill.grids import to_pixels
    from imagine_flash.distill.networks import load_networks
    from imagine_flash.folders.reading import read_student_manifest

    networks, manifest = load_networks(tiny_student), read_student_manifest(tiny_student)
    noise = torch.from_numpy(initial_noise(7, 2, networks.latent_shape))
    for steps, plan in manifest.step_plans.items():
        table = update_table(networks.schedule, plan, "v_prediction", noise_correction=manifest.noise_correction)
        expected = to_pixels(networks.decode(networks.sample(noise, networks.embed(["a cat"] * 2), table)))
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
        ({"count": 0}, "count must be a whole number from 1 to 64, got 0"),
        ({"count": 10_000}, "got 10000"),
        ({"height": 0}, "height must be a whole number of pixels, got 0"),
        ({"width": "64"}, "width must be a whole number of pixels, got '64'"),
        ({"cuont": 1}, "no 'cuont'"),
    ],
)
def test_bad_requests(values: dict, says: str) -> None:
    with pytest.raises(RequestError) as error:
        GenerateRequest(**{"prompt": "a cat", **values})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_the_model_cannot_draw(engine: Engine, tiny_artifact: Path) -> None:
    with pytest.raises(PlanError, match=r"steps must be 1, 2 or 3, got 4"):
        engine.generate(GenerateRequest(prompt="a cat", steps=4))
    with pytest.raises(RequestError, match=r"tokens.*shorten"):
        engine.generate(GenerateRequest(prompt="a cat on pink " * 9))
    with pytest.raises(RequestError, match=r"draws 64x64 \(width x height\), got 96x64"):
        engine.generate(GenerateRequest(prompt="a cat", width=96))
    with pytest.raises(ArtifactError, match="no backend 'cuda'"):
        Engine.load(tiny_artifact, backend="cuda")
    with pytest.raises(ArtifactError, match="no route"):
        Engine.load(tiny_artifact, route="fast")  # type: ignore[arg-type]


def test_seed_none_draws_one() -> None:
    seeds = {GenerateRequest(prompt="a cat", seed=None).seed for _ in range(4)}
    assert len(seeds) > 1


def test_a_hub_id_that_cannot_be_fetched_is_named(tiny_artifact: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"^nobody/nothing is no folder here and could not be fetched .*check the path"
    ):
        Engine.load("nobody/nothing")
