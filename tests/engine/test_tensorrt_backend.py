"""TensorRT plans as a backend: whole requests where a GPU is, and elsewhere all that needs no answer of TensorRT."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.core.images import psnr
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.choosing import choose, installed, load_backend
from imagine_flash.engine.backends.tensorrt import Bound, TensorrtBackend, plan_of
from imagine_flash.export.tensorrt import build_plans, write_plan, write_tensorrt
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.tests.artifacts import with_format
from imagine_flash.tests.tensorrt_artifact import HERE, NEEDS_TENSORRT, WITHOUT_TENSORRT, build_artifact, flip, key_of


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return build_artifact(tmp_path / "artifact")


# without TensorRT


@WITHOUT_TENSORRT
def test_one_line_says_what_is_missing(artifact: Path) -> None:
    write_plan(artifact, key_of(artifact), b"plan")
    with pytest.raises(MissingExtraError) as error:
        load_backend("tensorrt", artifact, read_artifact_manifest(artifact))
    assert str(error.value) == NEEDS_TENSORRT.format(artifact)


@WITHOUT_TENSORRT
def test_auto_takes_what_is_there(artifact: Path) -> None:
    write_plan(artifact, key_of(artifact), b"plan")
    assert "tensorrt" not in installed()
    assert choose("auto", read_artifact_manifest(artifact), folder=artifact) != "tensorrt"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (BackendOptions(device="cpu"), "device must be auto, cuda or cuda:0"),
        (BackendOptions(device="cuda:1"), "got 'cuda:1'; CUDA_VISIBLE_DEVICES=N makes another one the first"),
        (BackendOptions(precision="bf16"), "graphs' precision, fp32; for bf16 run 'imagine-flash export STUDENT OUT"),
    ],
)
def test_what_plans_cannot_do(artifact: Path, wanted: BackendOptions, says: str) -> None:
    with pytest.raises(ArtifactError) as error:
        load_backend("tensorrt", artifact, read_artifact_manifest(artifact), wanted)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_plans_are_of_this_machine_or_the_error_says_what_differs(artifact: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        plan_of(artifact, "denoiser", HERE)
    build = f"run 'imagine-flash build-tensorrt {artifact}'"
    assert str(error.value) == f"{artifact} has no TensorRT plan of 'denoiser'; {build}"
    plan = write_plan(artifact, key_of(artifact), b"plan")
    assert plan_of(artifact, "denoiser", HERE) == plan
    with pytest.raises(ArtifactError) as error:
        plan_of(artifact, "denoiser", HERE.model_copy(update={"sm": "sm_120", "tensorrt": "11.0.0"}))
    differs = "sm is sm_120 here and sm_90 in the plan, tensorrt is 11.0.0 here and 10.16.1.11 in the plan"
    assert str(error.value) == f"no TensorRT plan of 'denoiser' fits: {differs}; {build} here"
    flip(plan)
    with pytest.raises(ArtifactError, match="differs from its sha256"):
        plan_of(artifact, "denoiser", HERE)
    with pytest.raises(ArtifactError) as error:
        plan_of(artifact, "sampler_1", HERE)
    assert str(error.value).endswith(f"run 'imagine-flash build-tensorrt {artifact} --whole-sampler'")


def test_a_batch_between_two_sizes_is_padded_with_its_last_image() -> None:
    x, t, y = torch.full((4, 2), 9.0), torch.full((4,), 9.0), torch.zeros(4, 2)
    run = Bound(None, None, [x, t], [y], lambda: y.copy_(x * t[:, None]))
    for rows in (3, 1, 4):  # a smaller batch after a larger one sees none of it
        values = torch.arange(2.0 * rows).reshape(rows, 2)
        (got,) = run([values, torch.full((rows,), 2.0)])
        assert torch.equal(got, values * 2) and got.data_ptr() == y.data_ptr()
        assert torch.equal(x[rows:], values[-1:].expand(4 - rows, 2)) and bool((t == 2).all())


# with TensorRT and a GPU


@pytest.fixture(scope="module")
def planned(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact with a plan of every graph."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    folder = shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("planned") / "artifact")
    with_format(folder, "tensorrt", write_tensorrt)
    build_plans(folder, whole_sampler=True)
    return folder


@pytest.fixture(scope="module", params=["stages", "sampler"])
def engine(planned: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(planned, backend="tensorrt", route=request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def backend(planned: Path) -> Iterator[TensorrtBackend]:
    """One with the batch sizes 1 and 3, so that two images are padded."""
    backend = load_backend("tensorrt", planned, read_artifact_manifest(planned), BackendOptions(batches=(1, 3)))
    assert isinstance(backend, TensorrtBackend)
    yield backend
    backend.close()


def images(engine: Engine, **values) -> np.ndarray:
    return engine.generate(GenerateRequest(**{"prompt": "a cat", "steps": 3, "seed": 7, **values})).images


def inputs_of(backend: TensorrtBackend, rows: int, seed: int = 0) -> list:
    """x, timestep and conditions for the denoiser, arbitrary but the same for a seed."""
    rng = np.random.default_rng(seed)
    specs = backend.manifest.graphs["denoiser"].inputs
    values = [rng.standard_normal((3, *map(int, spec.shape[1:]))).astype(np.float32)[:rows] for spec in specs]
    values[1] = np.array([999, 500, 100], np.float32)[:rows]
    return [value if i == 1 else backend.upload(value) for i, value in enumerate(values)]


def denoised(backend: TensorrtBackend, rows: int, seed: int = 0) -> np.ndarray:
    x, timestep, *conditions = inputs_of(backend, rows, seed)
    return backend.denoise(x, timestep, conditions).cpu().numpy()


def levels(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_it_draws_what_onnxruntime_draws(engine: Engine, planned: Path, steps: int) -> None:
    with Engine.load(planned, backend="onnxruntime", device="cpu") as other:
        expected, got = (images(each, steps=steps, count=5) for each in (other, engine))
    assert levels(got, expected) <= 2 and psnr(got, expected) > 40
    assert engine.backend.describe().endswith(", CUDA graphs")


@pytest.mark.gpu
def test_a_batch_is_its_pictures_one_by_one(engine: Engine) -> None:
    batch = images(engine, count=7)  # more than one chunk
    assert levels(batch, np.stack([images(engine, seed=7 + i)[0] for i in range(7)])) <= 2


@pytest.mark.gpu
def test_concurrent_requests_do_not_mix(engine: Engine) -> None:
    prompts = ["a cat", "a dog", "a fox", "a rocket"]
    asked = [{"prompt": prompts[i % 4], "seed": i, "steps": 1 + i % 3} for i in range(12)]
    expected = [images(engine, **values) for values in asked]
    with ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda values: images(engine, **values), asked))
    assert all(levels(a, b) <= 2 for a, b in zip(expected, got, strict=True))


@pytest.mark.gpu
def test_a_request_is_untouched_by_the_one_before(engine: Engine) -> None:
    before = images(engine)
    other = images(engine, prompt="a dog on pink", seed=8, steps=2)
    assert levels(images(engine), before) <= 1 and levels(other, before) > 1


@pytest.mark.gpu
def test_padding_changes_nothing(backend: TensorrtBackend) -> None:
    denoised(backend, 3, seed=1)  # what would be left in the padded rows
    two, three = denoised(backend, 2), denoised(backend, 3)
    assert two.shape == (2, *three.shape[1:])
    np.testing.assert_allclose(two, three[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(denoised(backend, 1), three[:1], rtol=1e-2, atol=1e-2)  # other kernels, TF32
    with pytest.raises(ArtifactError, match="a batch of 4 is more than this engine was loaded for"):
        backend.denoise(np.zeros((4, *three.shape[1:]), np.float32), np.zeros(4, np.float32), [])


@pytest.mark.gpu
def test_the_replay_is_what_was_enqueued(
    backend: TensorrtBackend, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = [denoised(backend, 3, seed) for seed in (0, 1, 0)]
    assert "CUDA graphs" in backend.describe()
    monkeypatch.setattr(TensorrtBackend, "captures", False)
    plain = load_backend("tensorrt", planned, backend.manifest, BackendOptions(batches=(1, 3)))
    assert isinstance(plain, TensorrtBackend)
    for seed, got in zip((0, 1, 0), replayed, strict=True):
        np.testing.assert_allclose(got, denoised(plain, 3, seed), rtol=1e-5, atol=1e-5)
    assert np.abs(replayed[0] - replayed[1]).max() > 0.1
    plain.close()


@pytest.mark.gpu
def test_all_contexts_share_one_workspace(planned: Path) -> None:
    plain = load_backend("tensorrt", planned, read_artifact_manifest(planned), BackendOptions(batches=(1, 3)))
    assert isinstance(plain, TensorrtBackend)
    plain.prepare(["text_encoder", "denoiser", "decoder"], (1, 3))
    bound: list[Any] = [
        plain._graph(graph, batch) for graph in ("text_encoder", "denoiser", "decoder") for batch in (1, 3)
    ]
    assert len({one.workspace.data_ptr() for one in bound}) == 1
    plain.close()


@pytest.mark.gpu
def test_conditions_outlive_the_next_prompt(backend: TensorrtBackend) -> None:
    tokens = [np.full((1, 16), i, np.int64) for i in (1, 2)]
    first: Any = backend.encode({"input_ids": tokens[0]})
    copies = [value.cpu() for value in first]
    backend.encode({"input_ids": tokens[1]})
    assert all(torch.equal(value.cpu(), copy) for value, copy in zip(first, copies, strict=True))


@pytest.mark.gpu
def test_nan_is_found_in_the_image_that_has_it(backend: TensorrtBackend) -> None:
    x = np.zeros((3, *backend.manifest.latent_shape), np.float32)
    x[1, 0, 0, 0] = np.nan
    assert backend.finite(backend.upload(x)).tolist() == [True, False, True]


@pytest.mark.gpu
def test_auto_takes_the_plans(planned: Path) -> None:
    assert choose("auto", read_artifact_manifest(planned), folder=planned) == "tensorrt"
    assert choose("auto", read_artifact_manifest(planned), "cpu", planned) != "tensorrt"
