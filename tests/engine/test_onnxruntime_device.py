"""onnxruntime with its arrays on the device: whole requests on the CPU provider, and what CUDA's and TensorRT's are told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.core.images import psnr
from imagine_flash.core.sampler import Sampler
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.choosing import load_backend
from imagine_flash.engine.backends.onnxruntime_arrays import Device
from imagine_flash.engine.backends.onnxruntime_device import Bound
from imagine_flash.engine.backends.onnxruntime_providers import cuda_options, is_nvidia, providers, uncaptured
from imagine_flash.engine.reference import reference_generate
from imagine_flash.folders.manifests import ArtifactManifest, GraphSpec, TensorSpec
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.folders.sizes import AnySize
from imagine_flash.tests.onnxruntime_device import load, on_device

IMAGE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MASK = np.zeros((64, 64), bool)
MASK[:, 29:] = True
REQUESTS: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "three steps": {},
    "a padded batch": {"count": 2, "steps": 2},
    "more than one batch": {"count": 7},
    "a negative prompt": {"guidance": 3.0, "negative_prompt": "a dog"},
    "a negative prompt in more than one call": {"guidance": 3.0, "negative_prompt": "a dog", "count": 3},
    "a picture": {"image": IMAGE, "strength": 0.6, "count": 2},
    "a picture and a mask": {"image": IMAGE, "mask": MASK},
}


def ask(**values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "steps": 3, "seed": 7, **values})


def levels(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.fixture(scope="module", params=["captured", "uncaptured"])
def engine(tiny_artifact: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with on_device(tiny_artifact, captures=request.param == "captured") as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend="onnxruntime", device="cpu") as engine:
        yield engine


@pytest.mark.parametrize("values", REQUESTS.values(), ids=REQUESTS)
def test_it_draws_what_the_host_draws(engine: Engine, plain: Engine, values: dict[str, Any]) -> None:
    expected = plain.generate(ask(**values)).images
    for _ in range(2):  # the second time the prompt is known
        assert levels(engine.generate(ask(**values)).images, expected) <= 1


@pytest.mark.parametrize("backend", ["on device", "openvino"])
def test_a_negative_prompt_where_a_call_has_one_row(tiny_artifact: Path, plain: Engine, backend: str) -> None:
    """Two prompts to encode and two rows to draw; OpenVINO refused the prompts as a batch of 2."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    values = REQUESTS["a negative prompt"]
    with load(tiny_artifact, backend, max_batch=1) as engine:
        assert levels(engine.generate(ask(**values)).images, plain.generate(ask(**values)).images) <= 1


def test_it_draws_what_is_defined(engine: Engine, plain: Engine) -> None:
    got = reference_generate(engine.backend, engine.tokenizer, engine.manifest, ask(count=2))
    assert levels(got, plain.generate(ask(count=2)).images) <= 1


def test_requests_at_different_steps_share_a_batch(engine: Engine, plain: Engine) -> None:
    requests = [ask(prompt=p, seed=i, steps=3 - i % 3) for i, p in enumerate(["a cat", "a dog", "a fox"] * 3)]
    requests += [ask(**values) for values in REQUESTS.values()]
    found = [drawing.result(60).images for drawing in [engine.submit(request) for request in requests]]
    assert engine.batcher.counts["batch 3"] > 0
    for request, images in zip(requests, found, strict=True):
        assert levels(images, plain.generate(request).images) <= 1


def test_whole_samplers(tiny_artifact: Path, plain: Engine) -> None:
    with on_device(tiny_artifact, route="sampler") as engine:
        for steps, count in ((3, 1), (1, 2)):
            asked = ask(steps=steps, count=count)
            assert levels(engine.generate(asked).images, plain.generate(asked).images) <= 1


def test_fresh_noise(tiny_artifact: Path) -> None:
    """A plan that re-noises: its update reads a third array."""
    sampler = {"sampler": Sampler(kind="renoise", boundary=10.0), "noise_correction": False}
    with on_device(tiny_artifact, **sampler) as engine, Engine.load(tiny_artifact, backend="onnxruntime") as plain:
        described = plain.manifest.model_copy(update=sampler)
        expected = reference_generate(plain.backend, plain.tokenizer, described, ask(count=2))
        assert levels(engine.generate(ask(count=2)).images, expected) <= 1
        assert levels(expected, plain.generate(ask(count=2)).images) > 1


def test_what_a_known_prompt_at_one_step_runs(engine: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the networks three copies into their static arrays and the update; only noise and time go up."""
    backend: Any = engine.backend
    engine.generate(ask(steps=1))
    bodies, uploads, compute, upload = list[str](), list[tuple[int, ...]](), Device.compute, Device.upload

    def counted(self: Device, body: str, *args: Any, **inputs: Any) -> Any:
        bodies.append(body)
        return compute(self, body, *args, **inputs)

    monkeypatch.setattr(Device, "compute", counted)
    monkeypatch.setattr(Device, "upload", lambda self, values: uploads.append(values.shape) or upload(self, values))
    assert engine.generate(ask(steps=1)).cached
    assert sorted("Identity" in body for body in bodies) == [False, True, True, True]
    assert uploads == [(1, *engine.manifest.latent_shape)]
    assert backend.finite(backend.upload(np.full((1, 4, 8, 8), np.nan, np.float32))).tolist() == [False]


def test_conditions_outlive_the_next_prompt(engine: Engine) -> None:
    tokens = [engine.tokenizer.encode(prompt) for prompt in ("a cat", "a dog")]
    first = engine.backend.encode(tokens[0])
    copies = [np.asarray(one) for one in first]
    engine.backend.encode(tokens[1])
    assert all(np.array_equal(one, copy) for one, copy in zip(first, copies, strict=True))


def test_a_batch_beyond_the_largest(engine: Engine) -> None:
    x = np.zeros((4, *engine.manifest.latent_shape), np.float32)
    with pytest.raises(ArtifactError, match=r"a batch of 4 is more than this engine was loaded for \(3\)"):
        engine.backend.denoise(x, np.zeros(4, np.float32), ())


def test_each_graph_and_batch_is_bound_once(engine: Engine) -> None:
    backend: Any = engine.backend
    engine.generate(ask(count=3))
    bound = dict(backend._graphs)
    engine.generate(ask(count=3))
    assert dict(backend._graphs) == bound and all(isinstance(one, Bound) for one in bound.values())
    for (graph, batch), one in bound.items():
        spec = engine.artifact.graphs[graph]
        assert [a.shape for a in one.inputs] == [value.at(batch, (64, 64)) for value in spec.inputs]
        assert [a.shape for a in one.outputs] == [value.at(batch, (64, 64)) for value in spec.outputs]
    assert backend.describe().endswith(", CUDA graphs") == backend.captures


# arrays


@pytest.fixture(scope="module")
def device() -> Device:
    import onnxruntime

    return Device(onnxruntime, "cpu", 0, ["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arithmetic_is_numpys_to_the_bit(device: Device, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, y, mask = (rng.standard_normal(shape).astype(dtype) for shape in ((3, 4, 8, 8), (3, 4, 8, 8), (1, 1, 8, 8)))
    a, b, m = map(device.upload, (x, y, mask))
    half = dtype(0.3)
    pairs = [
        (a + b, x + y),
        (a - b, x - y),
        (a * 0.3, x * half),
        (0.3 * a, half * x),
        (np.float64(0.3) * a, half * x),
        (b + (a - b) * m, y + (x - y) * mask),
        (a[1:2] * 2 + y[1:2], x[1:2] * dtype(2) + y[1:2]),
        (0 * a, dtype(0) * x),
    ]
    for got, expected in pairs:
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert np.array_equal(np.asarray(got), expected)


def test_slices_share_memory_and_copies_do_not(device: Device) -> None:
    values = np.arange(24, dtype=np.int64).reshape(4, 6)
    whole = device.upload(values)
    part, copy = whole[1:3], whole[1:3].clone()
    part[:1].copy_(whole[3:])
    assert np.array_equal(np.asarray(whole), values[[0, 3, 2, 3]]) and np.array_equal(np.asarray(copy), values[1:3])
    assert part.address == whole.address + 48 and len(part) == 2 and part.ndim == 2 and part.nbytes == 96
    assert np.array_equal(np.asarray(whole[:2].reshape(1, -1, 3)), values[[0, 3]].reshape(1, -1, 3))
    joined = device.join([whole[3:], copy, whole[:1]])
    assert np.array_equal(np.asarray(joined), values[[3, 1, 2, 0]])
    values[:] = 0
    assert np.asarray(joined).any(), "what is uploaded is a copy"


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_smaller_batch_fills_a_static_array_with_its_last_image(device: Device, kind: str) -> None:
    static = device.upload(np.full((4, 2), 9.0, np.float32))
    for rows in (3, 1, 4):
        values = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
        static.write(values if kind == "host" else device.upload(values))
        assert np.array_equal(np.asarray(static), np.concatenate([values, values[-1:].repeat(4 - rows, axis=0)]))


def test_operators_need_the_package_that_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx.parser", None)
    with pytest.raises(MissingExtraError, match=r"needs onnx.*imagine-flash\[cuda\]"):
        Device(None, "cpu", 0, [])


# what the providers are told


def graph(nodes: dict[str, int] | None = None) -> GraphSpec:
    latents = TensorSpec(name="latents", dtype="float32", shape=["batch", 4, "height/8", "width/8"])
    times = TensorSpec(name="timestep", dtype="float32", shape=["batch"])
    return GraphSpec(file="denoiser.onnx", inputs=[latents, times], outputs=[latents], opset=20, nodes=nodes or {})


@pytest.fixture
def manifest(tiny_artifact: Path) -> ArtifactManifest:
    return read_artifact_manifest(tiny_artifact)


def test_cuda_is_told_what_the_precision_bears() -> None:
    """Float32 stays float32; half precision keeps its tensor cores, and its layout where the provider knows every operator."""
    exact, half = (cuda_options(0, precision, graph(), captures=True) for precision in ("fp32", "fp16"))
    assert (exact["use_tf32"], exact["prefer_nhwc"]) == (False, False)
    assert (half["use_tf32"], half["prefer_nhwc"]) == (True, True)
    norms = graph({"GroupNormalization": 21})
    assert cuda_options(0, "fp16", norms, captures=True)["prefer_nhwc"] is False
    assert cuda_options(0, "fp16", graph(), captures=True, is_fixed=False)["prefer_nhwc"] is False
    assert "device_id" not in exact and cuda_options(1, "fp32", graph(), captures=False)["device_id"] == 1


def test_convolutions_are_channels_last_where_all_is_known(manifest: ArtifactManifest) -> None:
    half = manifest.model_copy(update={"precision": "fp16", "graphs": {"denoiser": graph()}})

    def told(batch: int, is_fed: bool) -> bool:
        return providers("cuda", 0, half, "denoiser", batch, "1.31", is_fed=is_fed)[0][1]["prefer_nhwc"]

    assert told(1, False) and not told(0, False) and not told(1, True)


def test_without_cuda_graphs_all_else_stays(manifest: ArtifactManifest) -> None:
    for kind in ("cuda", "tensorrt"):
        given = providers(kind, 0, manifest, "denoiser", 1, "1.31")
        assert (
            sum(told.get(name) is True for _, told in given for name in ("enable_cuda_graph", "trt_cuda_graph_enable"))
            == 1
        )
        for (name, told), (other, less) in zip(given, uncaptured(given), strict=True):
            assert name == other and not any("cuda_graph" in key for key in less)
            assert {key: value for key, value in told.items() if "cuda_graph" not in key} == less
    assert [name for name, _ in providers("tensorrt", 0, manifest, "denoiser", 1, "1.31")] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]


def test_tensorrt_keeps_engines_by_content(
    manifest: ArtifactManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another graph, batch, version or file is another folder; one without a cache folder keeps none."""
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path))

    def told(graph: str = "denoiser", batch: int = 1, version: str = "1.31", **changes: Any) -> dict[str, Any]:
        return providers("tensorrt", 0, manifest.model_copy(update=changes), graph, batch, version)[0][1]

    others = [told("decoder"), told(batch=2), told(version="1.32"), told(files={}), told(precision="fp16")]
    folders = [one["trt_engine_cache_path"] for one in (told(), *others)]
    assert len(set(folders)) == 6 and folders[0] == told()["trt_engine_cache_path"]
    assert all(Path(folder).is_dir() and Path(folder).is_relative_to(tmp_path) for folder in folders)
    assert {one["trt_timing_cache_path"] for one in others} == {str(tmp_path / "onnxruntime" / "timings")}
    assert told()["trt_fp16_enable"] is False and others[-1]["trt_fp16_enable"] is True
    assert not any("profile" in key for key in told()), "each batch has a session of its own"
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", "")
    assert not any("cache" in key for key in told())


def test_tensorrt_is_told_the_range_of_any_size(manifest: ArtifactManifest) -> None:
    free = manifest.model_copy(
        update={"graphs": {"denoiser": graph()}, "any_size": AnySize(smallest=32, largest=96, multiple=16)}
    )
    told = providers("tensorrt", 0, free, "denoiser", 0, "1.31")[0][1]
    assert told["trt_profile_min_shapes"] == "latents:1x4x4x4,timestep:1"
    assert told["trt_profile_opt_shapes"] == "latents:1x4x8x8,timestep:1"
    assert told["trt_profile_max_shapes"] == "latents:3x4x12x12,timestep:3"


def test_only_nvidias_devices_keep_arrays() -> None:
    assert all(map(is_nvidia, ("cuda", "cuda:1", "tensorrt")))
    assert not any(map(is_nvidia, ("cpu", "directml", "coreml", "gpu")))


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_gpu_draws_what_the_processor_draws(
    tiny_artifact: Path, plain: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    wanted = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[name]
    if wanted not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    if name == "tensorrt":
        pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path))
    with Engine.load(tiny_artifact, backend="onnxruntime", device=name) as engine:
        for values in REQUESTS.values():
            for _ in range(3):  # run, captured, replayed
                got, expected = (each.generate(ask(**values)).images for each in (engine, plain))
                assert levels(got, expected) <= 2 and psnr(got, expected) > 40
        if name == "cuda":
            assert engine.backend.describe().endswith(", CUDA graphs")


@pytest.mark.gpu
def test_a_replay_is_what_was_run(tiny_artifact: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    described, rng = read_artifact_manifest(tiny_artifact), np.random.default_rng(0)
    x = rng.standard_normal((3, *described.latent_shape)).astype(np.float32)
    given = [
        rng.standard_normal(value.at(3, (64, 64))).astype(np.float32) for value in described.graphs["denoiser"].inputs
    ]
    found = []
    for captures in (True, False):
        backend: Any = load_backend(
            "onnxruntime", tiny_artifact, described, BackendOptions(device="cuda", batches=(1, 3))
        )
        backend.captures = captures
        found.append([np.asarray(backend.denoise(x * k, *given[1:2], given[2:])) for k in (1, 2, 1)])
        backend.close()
    for replayed, run in zip(*found, strict=True):
        np.testing.assert_allclose(replayed, run, rtol=1e-5, atol=1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 0.01
