"""Models that re-noise between steps, and guidance: the engine against the update's own definition, alone and in a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine_flash.core.errors import RequestError
from imagine_flash.core.sampler import Sampler
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.reference import reference_generate
from imagine_flash.folders.manifests import Guidance
from imagine_flash.tests import architectures, pipelines

SAMPLERS = {
    "renoise": Sampler(kind="renoise", boundary=10.0),
    "ancestral": Sampler(kind="ancestral", start="sigma"),
    "strategic": Sampler(kind="strategic", gamma=0.7, end="least"),
    "scaled": Sampler(start="sigma"),
}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny student, told to be sampled in each of these ways."""
    folder = pipelines.build_student(tmp_path_factory.mktemp("students") / "deterministic", half=False)
    found = {}
    for name, sampler in SAMPLERS.items():
        found[name] = folder.with_name(name)
        found[name].mkdir()
        for part in folder.iterdir():
            (found[name] / part.name).symlink_to(part)
        (found[name] / "imagine_flash.json").unlink()
        pipelines.describe(found[name], sampler=sampler, noise_correction=False)
    return found


def ask(**values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "steps": 3, "seed": 7, **values})


def expected_images(engine: Engine, **values: Any) -> np.ndarray:
    return reference_generate(engine.backend, engine.tokenizer, engine.manifest, ask(**values))


def likeness(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_fresh_noise_is_the_seeds_own(students: dict[str, Path], name: str) -> None:
    with Engine.load(students[name], backend="torch") as engine:
        for steps in (1, 2, 3):
            got = engine.generate(ask(steps=steps, count=3))
            alone = [expected_images(engine, seed=7 + i, steps=steps)[0] for i in range(3)]
            assert likeness(got.images, np.stack(alone)) <= 1
        plain = Sampler(start=SAMPLERS[name].start)
        engine.manifest = engine.manifest.model_copy(update={"sampler": plain})
        differs = likeness(expected_images(engine, seed=9), got.images[2:]) > 1
        assert differs == (SAMPLERS[name] != plain), "fresh noise changes the picture"


def test_pictures_that_take_fresh_noise_share_calls_with_those_that_take_none(students: dict[str, Path]) -> None:
    with Engine.load(students["renoise"], backend="torch") as engine:
        alone = [engine.generate(ask(seed=seed, steps=steps)).images for seed, steps in ((1, 3), (2, 1), (3, 2))]
        drawn = [engine.submit(ask(seed=seed, steps=steps)) for seed, steps in ((1, 3), (2, 1), (3, 2))]
        assert all(likeness(one.result(20).images, other) <= 1 for one, other in zip(drawn, alone, strict=True))


@pytest.mark.parametrize("max_batch", [1, 2, 5])
def test_guidance_weighs_the_prompt_against_another(students: dict[str, Path], max_batch: int) -> None:
    with Engine.load(students["renoise"], backend="torch", max_batch=max_batch) as engine:
        for negative in ("", "a dog on pink"):
            got = engine.generate(ask(guidance=4.0, negative_prompt=negative or None, count=2))
            alone = [expected_images(engine, seed=7 + i, guidance=4.0, negative_prompt=negative)[0] for i in range(2)]
            assert likeness(got.images, np.stack(alone)) <= 1 and got.guidance == 4.0
        together = [engine.submit(ask(guidance=g, seed=5)) for g in (1.0, 2.0, 3.0)]
        for drawing, g in zip(together, (1.0, 2.0, 3.0), strict=True):
            assert likeness(drawing.result(20).images, expected_images(engine, seed=5, guidance=g)) <= 1


def test_an_empty_negative_prompt_may_mean_zeros(students: dict[str, Path]) -> None:
    with Engine.load(students["scaled"], backend="torch") as engine:
        text = engine.generate(ask(guidance=4.0)).images
        zero = Guidance(empty_is_zero=True)
        engine.manifest = engine.manifest.model_copy(update={"guidance": zero})
        engine.batcher._conditioning.guidance = zero
        got = engine.generate(ask(guidance=4.0)).images
        assert likeness(got, text) > 1 and likeness(got, expected_images(engine, guidance=4.0)) <= 1
        dog = engine.generate(ask(guidance=4.0, negative_prompt="a dog")).images
        assert likeness(dog, expected_images(engine, guidance=4.0, negative_prompt="a dog")) <= 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"guidance": -1.0}, "guidance must be a number from 0 to 50"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"guidance": "much"}, "guidance must be"),
        ({"negative_prompt": "a dog"}, "reads no negative prompt here: guidance is 1"),
        ({"negative_prompt": "a dog", "guidance": 0.0}, "guidance is 0"),
        ({"negative_prompt": 3}, "negative_prompt must be a text"),
    ],
)
def test_guidance_that_is_none(students: dict[str, Path], values: dict[str, Any], says: str) -> None:
    with Engine.load(students["scaled"], backend="torch") as engine, pytest.raises(RequestError, match=says):
        engine.generate(ask(**values))


def test_a_models_own_guidance_and_steps_are_the_default(students: dict[str, Path]) -> None:
    with Engine.load(students["scaled"], backend="torch") as engine:
        engine.manifest = engine.manifest.model_copy(update={"guidance": Guidance(default=3.0), "default_steps": 2})
        got = engine.generate(GenerateRequest(prompt="a cat", seed=7))
        assert got.guidance == 3.0 and got.steps == 2
        assert likeness(got.images, engine.generate(ask(guidance=3.0, steps=2)).images) == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that re-noises and whose network is told its guidance."""
    folder = tmp_path_factory.mktemp("students") / "told"
    architectures.build_lcm().save_pretrained(folder)
    return pipelines.describe(folder, sampler=SAMPLERS["renoise"], noise_correction=False, guidance={"default": 8.0})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["told", pytest.param("scaled", marks=pytest.mark.weekly)])
def test_exports_take_the_noises_as_inputs(students: dict[str, Path], told: Path, tmp_path: Path, name: str) -> None:
    """Torch, both backends and both routes draw the same; a scale that the network is told is an input like the noises."""
    from imagine_flash.export import ExportOptions, export_student

    students = {**students, "told": told}
    options = ExportOptions(batch=(1, 2), image_encoder=False)
    manifest = export_student(students[name], tmp_path / name, options=options)
    inputs = {spec.name: spec.shape for spec in manifest.graphs["sampler_3"].inputs}
    assert inputs.get("fresh_noise") == (["batch", 2, 4, 8, 8] if name == "told" else None)
    assert inputs.get("guidance") == (["batch"] if name == "told" else None) and manifest.guidance.embedded == (
        name == "told"
    )
    with Engine.load(students[name], backend="torch") as engine:
        expected = {steps: engine.generate(ask(steps=steps, count=2)).images for steps in (1, 2, 3)}
        guided = engine.generate(ask(guidance=3.0)).images
    for backend in ("onnxruntime", "openvino"):
        for route in ("stages", "sampler"):
            with Engine.load(tmp_path / name, backend=backend, precision="fp32", route=route) as engine:
                for steps, images in expected.items():
                    assert likeness(engine.generate(ask(steps=steps, count=2)).images, images) <= 1
                if route == "stages" or name == "told":
                    assert likeness(engine.generate(ask(guidance=3.0)).images, guided) <= 1
                else:
                    with pytest.raises(RequestError, match="whole-sampler graphs draw without guidance"):
                        engine.generate(ask(guidance=3.0))
