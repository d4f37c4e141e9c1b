"""The prompt cache: a repeated prompt skips the encoder, and neither bytes nor threads break that."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.core.errors import RequestError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.prompt_cache import PromptCache


def ids(number: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.array([[number, 1, 2]]), "input_ids_2": np.array([[number, 5]])}


def embedding(number: int) -> tuple[np.ndarray, ...]:
    return np.full((1, 20), number, np.float32), np.full((1, 5), -number, np.float32)  # 100 bytes


def get(cache: PromptCache, tokens, encode):
    found = cache.find(tokens)
    return cache.keep(tokens, encode()) if found is None else found


def test_prompts_that_differ_for_one_of_two_encoders_are_two() -> None:
    cache = PromptCache()
    one, other = ids(1), {**ids(1), "input_ids_2": np.array([[1, 6]])}
    assert get(cache, one, lambda: embedding(1))[0][0, 0] == 1 and get(cache, other, lambda: embedding(2))[0][0, 0] == 2
    assert [part[0, 0] for part in get(cache, one, lambda: embedding(3))] == [1, -1]


def test_the_oldest_entry_gives_way() -> None:
    cache, encoded = PromptCache(250), []

    def draw(number: int) -> float:
        def encode() -> tuple[np.ndarray, ...]:
            encoded.append(number)
            return embedding(number)

        return get(cache, ids(number), encode)[0][0, 0]

    assert [draw(n) for n in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert encoded == [1, 2, 3, 2], "2 was used longest ago when 3 came"
    assert (cache.hits, cache.misses, len(cache), cache.used_bytes) == (2, 4, 2, 200)
    cache.clear()
    assert (len(cache), cache.used_bytes, cache.hits) == (0, 0, 2)


@pytest.mark.parametrize("max_bytes", [0, 99])
def test_what_does_not_fit_is_not_kept(max_bytes: int) -> None:
    cache = PromptCache(max_bytes)
    for _ in range(2):
        assert get(cache, ids(1), lambda: embedding(1))[0][0, 0] == 1
    assert (cache.hits, cache.misses, len(cache)) == (0, 2, 0)


def test_an_entry_cannot_be_written() -> None:
    cache = PromptCache()
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            get(cache, ids(1), lambda: embedding(1))[0][0, 0] = 5


def test_a_failed_encoder_leaves_nothing() -> None:
    cache = PromptCache()

    def fail() -> tuple[np.ndarray, ...]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        get(cache, ids(1), fail)
    assert len(cache) == 0 and get(cache, ids(1), lambda: embedding(1))[0][0, 0] == 1


def test_threads_count_every_lookup_and_the_bytes_of_what_is_kept() -> None:
    cache = PromptCache(1000)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: get(cache, ids(n % 20), lambda: embedding(n % 20))[0][0, 0], range(2000)))
    assert got == [n % 20 for n in range(2000)]
    assert cache.hits + cache.misses == 2000 and cache.used_bytes == 100 * len(cache) <= 1000


@pytest.mark.parametrize("size", [-1, 1.5, True, "1 GB"])
def test_a_wrong_size_is_named(size: object) -> None:
    with pytest.raises(RequestError, match=f"whole number of bytes >= 0, got {size!r}"):
        PromptCache(size)  # type: ignore[arg-type]


def test_the_engine_draws_the_same_from_the_cache(tiny_artifact: Path) -> None:
    engine, without = Engine.load(tiny_artifact), Engine.load(tiny_artifact, prompt_cache_bytes=0)
    request = GenerateRequest(prompt="a cat", seed=3, count=2)
    first, second, fresh = (e.generate(request).images for e in (engine, engine, without))
    assert np.array_equal(first, second) and np.array_equal(first, fresh)
    assert (engine.prompt_cache.hits, engine.prompt_cache.misses) == (1, 1)
    assert (without.prompt_cache.hits, len(without.prompt_cache)) == (0, 0)
    engine.generate(GenerateRequest(prompt="a dog", seed=3))
    assert engine.prompt_cache.misses == 2
