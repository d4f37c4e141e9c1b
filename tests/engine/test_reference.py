"""The definition that the engine is held against, and what it decides: whether a model draws well in bfloat16."""

import json
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.loading import LoadOptions, load_model
from imagine_flash.engine.precision import is_remembered, lowest_psnr
from imagine_flash.engine.reference import reference_generate
from imagine_flash.folders.reading import read_artifact_manifest


def test_the_engine_draws_the_definition(tiny_artifact: Path) -> None:
    model = load_model(tiny_artifact, LoadOptions(backend="onnxruntime"))
    asked = [GenerateRequest(prompt="a cat", seed=3, steps=steps, count=count) for steps, count in ((1, 1), (3, 2))]
    expected = [reference_generate(model.backend, model.tokenizer, model.manifest, one) for one in asked]
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        for request, images in zip(asked, expected, strict=True):
            assert images.shape == (request.count, 64, 64, 3) and images.std() > 5
            assert np.abs(engine.generate(request).images.astype(int) - images).max() <= 1
        assert engine.stats().pictures == 3 and engine.stats().waiting == 0
        assert sum(rows * calls for rows, calls in engine.stats().batches.items()) == 1 + 2 * 3
        assert (engine.stats().cache_hits, engine.stats().cache_misses) == (1, 1)


def test_a_precision_is_judged_once_by_the_worst_picture(tiny_artifact: Path, tmp_path: Path) -> None:
    manifest = read_artifact_manifest(tiny_artifact)
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        same = lowest_psnr(tiny_artifact, manifest, lambda asked: engine.generate(asked).images[0])
    assert same > 50
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert lowest_psnr(tiny_artifact, manifest, lambda asked: grey) < 20

    def fails(asked: GenerateRequest) -> np.ndarray:
        raise ImagineFlashError("no such instruction")

    assert lowest_psnr(tiny_artifact, manifest, fails) == 0
    assert is_remembered(tmp_path, "bf16 here", lambda: same) and not is_remembered(tmp_path, "bf16 there", lambda: 20)
    assert is_remembered(tmp_path, "bf16 here", lambda: pytest.fail("measured again"))
    (kept,) = [file for file in tmp_path.iterdir() if json.loads(file.read_text())["psnr"] == 20]
    kept.write_text("damaged")
    assert is_remembered(tmp_path, "bf16 there", lambda: 40)
    assert not is_remembered(tmp_path / "read-only", "bf16 here", lambda: same), "nothing to keep it in"


def test_an_error_is_no_judgement(tiny_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Too little memory at the first start counted as 0 dB, and the slower precision was taken ever after."""
    manifest = read_artifact_manifest(tiny_artifact)

    def fails(asked: GenerateRequest) -> np.ndarray:
        raise ImagineFlashError("cannot allocate memory")

    assert not is_remembered(tmp_path, "bf16", lambda: lowest_psnr(tiny_artifact, manifest, fails))
    assert "bf16 is not judged, and not used this time: cannot allocate memory" in caplog.text
    assert is_remembered(tmp_path, "bf16", lambda: 40.0) and is_remembered(tmp_path, "bf16", lambda: 0.0)
