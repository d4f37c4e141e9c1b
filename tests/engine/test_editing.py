"""Drawing from a picture: the loop by hand, what a mask keeps, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.core.errors import RequestError
from imagine_flash.core.noise import initial_noise
from imagine_flash.core.update import reference_update
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.editing import first_step, latent_mask, restore

IMAGE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def engine(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        yield engine


def ask(**values) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "steps": 3, "seed": 7, "image": IMAGE, **values})


def half_mask() -> np.ndarray:
    mask = np.zeros((64, 64), np.float32)
    mask[:, 29:] = 1  # not on a latent's border
    return mask


def by_hand(engine: Engine, strength: float, steps: int, count: int, mask: np.ndarray | None = None) -> np.ndarray:
    """The definition, in NumPy around the backend's networks."""
    table, schedule, backend = engine.manifest.update_tables()[steps], engine.manifest.schedule, engine.backend
    alpha, sigma = schedule.at(table.timesteps)
    noise = initial_noise(7, count, engine.manifest.latent_shape)
    z = np.asarray(backend.encode_image(IMAGE[None]), np.float64)
    tokens = engine.tokenizer.encode("a cat")
    conditions = tuple(np.repeat(one, count, axis=0) for one in backend.encode(tokens))
    first = first_step(list(table.timesteps), 999, strength)
    x = noise if strength == 1 else (alpha[first] * z + sigma[first] * noise).astype(np.float32)
    for i in range(first, steps):
        t = np.full(count, table.timesteps[i], np.float32)
        x = reference_update(x, backend.denoise(x, t, conditions), table, i)
        if mask is not None:
            a, s = (alpha[i + 1], sigma[i + 1]) if i + 1 < steps else (1.0, 0.0)
            x = np.where(latent_mask(mask, 8) == 1, x, a * z + s * noise).astype(np.float32)
    images, _ = backend.decode(x)
    return images if mask is None else np.where(mask[..., None] == 1, images, IMAGE)


@pytest.mark.parametrize(("strength", "steps", "count"), [(0.3, 3, 1), (0.7, 3, 5), (0.5, 2, 2), (0.9, 1, 1)])
def test_image_to_image_is_the_loop_from_the_nearest_step(engine: Engine, strength, steps, count) -> None:
    got = engine.generate(ask(strength=strength, steps=steps, count=count))
    expected = by_hand(engine, strength, steps, count)
    assert np.abs(got.images.astype(int) - expected.astype(int)).max() <= 1
    calls = steps - first_step([999] if steps == 1 else [999, 499] if steps == 2 else [999, 666, 333], 999, strength)
    assert len(got.timings.denoise) == calls * -(-count // engine.max_batch)


@pytest.mark.parametrize(("values", "there_is_one"), [({}, False), ({"strength": 1.0}, True), ({"mask": "half"}, True)])
def test_no_preview_of_what_it_would_not_show(engine: Engine, values: dict, there_is_one: bool) -> None:
    """One step begins with noise alone: the preview was another picture, for as many calls as the picture itself."""
    given = values | ({"mask": half_mask()} if "mask" in values else {})
    assert (engine.preview(engine.prepare(ask(steps=3, **given))) is not None) == there_is_one


@pytest.mark.parametrize("strength", [None, 0.6])
def test_inpainting_keeps_the_rest_to_the_bit(engine: Engine, strength: float | None) -> None:
    got = engine.generate(ask(mask=half_mask(), strength=strength, count=2)).images
    expected = by_hand(engine, strength or 1.0, 3, 2, half_mask())
    assert np.array_equal(got[:, :, :29], np.broadcast_to(IMAGE[:, :29], (2, 64, 29, 3)))
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1
    assert not np.array_equal(got[0, :, 29:], IMAGE[:, 29:]) and not np.array_equal(got[0], got[1])


def test_a_full_mask_is_text_to_image_and_an_empty_one_the_picture(engine: Engine) -> None:
    plain = engine.generate(GenerateRequest(prompt="a cat", steps=3, seed=7)).images
    full = engine.generate(ask(mask=np.ones((64, 64), bool))).images
    assert np.abs(plain.astype(int) - full).max() <= 1
    assert np.array_equal(engine.generate(ask(mask=np.zeros((64, 64), bool))).images[0], IMAGE)


def test_edits_and_plain_requests_share_a_batch(engine: Engine) -> None:
    requests = [ask(strength=0.7), GenerateRequest(prompt="a dog", steps=3, seed=1), ask(mask=half_mask())]
    alone = [engine.generate(request).images for request in requests]
    futures = [engine.submit(request) for request in requests]
    for future, expected in zip(futures, alone, strict=True):
        assert np.abs(future.result(20).images.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("timesteps", "strength", "step"),
    [
        ((999, 749, 499), 1.0, 0),
        ((999, 749, 499), 0.9, 0),
        ((999, 749, 499), 0.8, 1),
        ((999, 749, 499), 0.1, 2),
        ((999,), 0.01, 0),
        ((999, 333), 0.67, 0),
        ((999, 333), 0.66, 1),
    ],
)
def test_where_a_strength_starts(timesteps, strength, step) -> None:
    assert first_step(timesteps, 999, strength) == step


def test_masks() -> None:
    mask = np.zeros((4, 6), np.float32)
    mask[1, 2] = 0.5
    assert latent_mask(mask, 2).tolist() == [[[[0, 0.5, 0], [0, 0, 0]]]]
    images, original = np.full((1, 4, 6, 3), 200, np.uint8), np.full((4, 6, 3), 101, np.uint8)
    mixed = restore(images, original, mask)
    assert mixed[0, 1, 2].tolist() == [150, 150, 150] and (np.delete(mixed.reshape(-1, 3), 8, 0) == 101).all()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image": IMAGE[:32]}, "image must have the request's size 64x64, got 64x32"),
        ({"mask": np.ones((32, 64), bool)}, "mask must have the request's size 64x64, got 64x32"),
        ({"image": IMAGE.astype(np.float32)}, "image must be uint8 (H, W, 3), got float32 (64, 64, 3)"),
        ({"image": IMAGE[..., 0]}, "got uint8 (64, 64)"),
        ({"mask": IMAGE}, "mask must be (H, W) of bool or of numbers from 0 to 1, got uint8 (64, 64, 3)"),
        ({"mask": np.full((64, 64), 1.5)}, "numbers from 0 to 1"),
        ({"mask": np.full((64, 64), np.nan)}, "numbers from 0 to 1"),
        ({"image": None, "mask": half_mask()}, "mask and strength need an image"),
        ({"image": None, "strength": 0.5}, "mask and strength need an image"),
        ({"strength": 0.0}, "strength must be a number above 0, at most 1, got 0.0"),
        ({"strength": 1.5}, "got 1.5"),
        ({"image": "a.png"}, "image must be uint8 (H, W, 3)"),
    ],
)
def test_what_cannot_be_edited(engine: Engine, values: dict, says: str) -> None:
    with pytest.raises(RequestError) as error:
        engine.generate(ask(**values))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_artifact_without_an_encoder_says_how_to_get_one(tiny_artifact: Path) -> None:
    with (
        Engine.load(tiny_artifact, backend="onnxruntime", route="sampler") as whole,
        pytest.raises(RequestError, match=r"route 'stages'.*--image-encoder"),
    ):
        whole.generate(ask())
