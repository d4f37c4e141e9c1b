"""Student folders in torch: the oracle of the artifacts, equal to them, and its own faster modes equal to it."""

import dataclasses
import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError, MissingExtraError, RequestError
from imagine_flash.core.images import psnr
from imagine_flash.core.noise import initial_noise
from imagine_flash.core.update import sample
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.choosing import choose
from imagine_flash.engine.backends.torch import TorchBackend, load_student
from imagine_flash.engine.backends.torch_modes import OnGpu, device_of, keep_channels_last
from imagine_flash.folders.files import ARTIFACT_FILE
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests import architectures, pipelines

PROMPT = "a fox on a pink background"


@pytest.fixture(scope="module")
def engine(tiny_student: Path) -> Iterator[Engine]:
    with Engine.load(tiny_student) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Path) -> Iterator[Engine]:
    with Engine.load(tiny_artifact, backend="onnxruntime") as loaded:
        yield loaded


def images(engine: Engine, **request: Any) -> np.ndarray:
    return engine.generate(GenerateRequest(**{"prompt": PROMPT, "seed": 7, **request})).images.astype(int)


def levels(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


def test_a_student_folder_runs_in_torch(engine: Engine, tiny_student: Path) -> None:
    assert engine.backend.name == "torch" and engine.max_batch == 4 and engine.steps == [1, 2, 3]
    assert f"torch {torch.__version__}" in engine.describe() and "batches of up to 4" in engine.describe()
    if not torch.cuda.is_available():
        assert "on cpu, fp32, eager" in engine.describe()
    with Engine.load(tiny_student, backend="torch", device="cpu", max_batch=63) as other:
        assert other.max_batch == 63 and other.describe().startswith("student: torch")
    assert engine.generate(GenerateRequest(prompt="a yak", seed=1)).unknown_words == ["yak"]


@pytest.fixture(scope="module")
def oracle(tiny_student: Path) -> Iterator[Engine]:
    """The slow, correct path: modules in float32 on the CPU."""
    with Engine.load(tiny_student, backend="torch", device="cpu") as loaded:
        yield loaded


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_it_draws_what_the_artifact_draws(oracle: Engine, artifact: Engine, steps: int) -> None:
    assert levels(images(oracle, steps=steps, count=3), images(artifact, steps=steps, count=3)) <= 1


def test_a_batch_is_its_pictures(oracle: Engine) -> None:
    batch = images(oracle, count=3)
    assert levels(batch, np.concatenate([images(oracle, seed=7 + i) for i in range(3)])) <= 1


def test_mixed_steps_share_calls(oracle: Engine) -> None:
    """Rows of one update have coefficients of their own, and what one request writes in place is no other's."""
    requests = [
        {"prompt": text, "steps": steps, "seed": i}
        for i, (text, steps) in enumerate(
            [("a cat", 1), (PROMPT, 3), ("a fox", 2), ("a dog", 3), ("a cat", 2), ("a house", 1)]
        )
    ]
    alone = [images(oracle, **request) for request in requests]
    shared = oracle.batcher.counts["batch 3"] + oracle.batcher.counts["batch 4"]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: images(oracle, **request), requests))
    assert max(map(levels, alone, together)) <= 1
    assert oracle.batcher.counts["batch 3"] + oracle.batcher.counts["batch 4"] > shared


def test_pictures_from_pictures_need_no_export(oracle: Engine, artifact: Engine, tiny_student: Path) -> None:
    """Where the artifact has an image encoder, it starts from the same latents."""
    start = images(artifact, seed=3)[0].astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    stages = load_stages(tiny_student)
    with torch.inference_mode():
        expected = stages.image_encoder(torch.from_numpy(start[None]))
    assert np.allclose(oracle.backend.encode_image(start[None]), expected, atol=1e-4)
    for steps, strength in ((3, 0.5), (2, 1.0)):
        drawn = images(oracle, image=start, steps=steps, strength=strength)
        assert levels(drawn, images(oracle, steps=steps)) > 1 or strength == 1.0
        assert levels(drawn, images(artifact, image=start, steps=steps, strength=strength)) <= 1
    inpainted = images(oracle, image=start, mask=mask)[0]
    assert np.array_equal(inpainted[:, :32], start[:, :32]) and not np.array_equal(inpainted[:, 32:], start[:, 32:])


def test_a_prompt_is_encoded_once(tiny_student: Path) -> None:
    with Engine.load(tiny_student) as engine:
        encode, calls = engine.backend.encode, []
        engine.backend.encode = lambda tokens: calls.append(1) or encode(tokens)  # type: ignore[method-assign]
        first, second = (engine.generate(GenerateRequest(prompt=PROMPT, seed=1)) for _ in range(2))
        assert not first.cached and second.cached and len(calls) == 1
        assert np.array_equal(first.images, second.images)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(oracle: Engine, tiny_student: Path, precision: str) -> None:
    with Engine.load(tiny_student, device="cpu", precision=precision) as half:
        assert f"{precision}, eager" in half.describe() and half.manifest.precision == precision
        drawn, exact = images(half, count=2).astype(np.uint8), images(oracle, count=2).astype(np.uint8)
    assert 30 < psnr(drawn, exact) < 100


@pytest.mark.parametrize("kind", [kind for kind in architectures.BUILDERS if kind != "sd15"])
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    """At a size that is not the networks' own, against the stages stepped by core's definition, and in bf16."""
    student, size = architectures.build_student(kind, tmp_path / "student"), (64, 96)
    with Engine.load(student, device="cpu", sizes=[size]) as engine:
        got, model = images(engine, steps=2), engine.manifest
    stages, table = load_stages(student), model.update_tables()[2]
    with torch.inference_mode():
        text = stages.text_encoder(*stages.encode_prompts([PROMPT]).values())
        told = model.schedule.network_time
        x_T = torch.from_numpy(initial_noise(7, 1, stages.latent_shape(size)))
        x = sample(lambda x, t: stages.denoiser(size)(x, torch.tensor([float(told(t))]), *text), x_T, table)
        expected = stages.decoder(x)[0].numpy().astype(int)
    assert levels(got, expected) <= 1
    with Engine.load(student, device="cpu", sizes=[size], precision="bf16") as half:
        assert psnr(images(half, steps=2).astype(np.uint8), expected.astype(np.uint8)) > 25


def test_a_lora_student(tmp_path: Path) -> None:
    """It draws something else than its base, and what its fused networks draw."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base, student = tmp_path / "base", tmp_path / "student"
    pipeline = pipelines.build_pipeline()
    pipeline.save_pretrained(base, safe_serialization=True)
    pipelines.describe(base)
    torch.manual_seed(4)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    student.mkdir()
    adapter: Any = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(student, unet_lora_layers=adapter)
    pipelines.describe(student, base="../base")
    pipeline.unet.fuse_lora()
    fused = tmp_path / "fused"
    plain = pipelines.build_pipeline()
    plain.unet.load_state_dict(
        {
            name.replace(".base_layer", ""): value
            for name, value in pipeline.unet.state_dict().items()
            if "lora_" not in name
        }
    )
    plain.save_pretrained(fused, safe_serialization=True)
    pipelines.describe(fused)
    drawn = {folder.name: images(Engine.load(folder, device="cpu"), steps=1) for folder in (base, student, fused)}
    assert levels(drawn["student"], drawn["fused"]) <= 1 < levels(drawn["student"], drawn["base"])
    with Engine.load(student, device="cpu", precision="bf16") as half:
        assert psnr(images(half, steps=1).astype(np.uint8), drawn["fused"].astype(np.uint8)) > 30


def test_closing_frees_the_networks(tiny_student: Path) -> None:
    engine = Engine.load(tiny_student)
    images(engine)
    assert isinstance(engine.backend, TorchBackend)
    network: Any = engine.backend._networks["denoiser"]
    weights = weakref.ref(next(network.parameters()))
    del network
    engine.close()
    gc.collect()
    assert weights() is None


class Toy(torch.nn.Module):
    """A denoiser small enough to compile in a test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        told = (timestep / 1000).to(x.dtype)[:, None, None, None] + embeddings.mean(dim=(1, 2))[:, None, None, None]
        return self.convolution(x) + told


def toy_backend(tiny_student: Path, name: str, device: str, batches: tuple[int, ...] = (1, 2, 4)) -> TorchBackend:
    loaded, _, model = load_student(tiny_student, "torch", BackendOptions(device="cpu", precision="fp32"), None)
    loaded.close()
    stages = dataclasses.replace(load_stages(tiny_student), denoiser=lambda size: Toy().eval().requires_grad_(False))
    return TorchBackend(tiny_student, model, stages, device_of(device), name=name, batches=batches)


def coefficients(backend: TorchBackend) -> tuple[np.ndarray, np.ndarray]:
    """Of the model's three steps: on a GPU the update knows no others."""
    table = backend.manifest.update_tables()[3]
    return table.a.astype(np.float32), table.b.astype(np.float32)


def walk(backend: Any, rows: int) -> np.ndarray:
    """Two steps and the decoder, as the batcher calls them: with conditions that it has copied."""
    tokens = {"input_ids": np.arange(16, dtype=np.int64)[None].repeat(rows, 0)}
    conditions = tuple(values.clone() for values in backend.encode(tokens))
    x = backend.upload(initial_noise(0, rows, (4, 8, 8)))
    times, (a, b) = np.linspace(999, 500, rows, dtype=np.float32), coefficients(backend)
    for _ in range(2):
        x = backend.update(x, backend.denoise(x, times, conditions), a[:rows], b[:rows])
    assert backend.finite(x).all()
    images, finite = backend.decode(x)
    assert finite.all()
    return images.astype(int)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_is_eager(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows are padded to the bucket of four, and nothing is compiled again after `prepare`."""
    vae = pipelines.build_vae("tiny", 8)
    plain = load_stages(tiny_student)
    small = dataclasses.replace(plain, decoder=type(plain.decoder)(vae.eval().requires_grad_(False)))
    monkeypatch.setattr(f"{__name__}.load_stages", lambda folder: small)
    eager, fast = (toy_backend(tiny_student, name, "cpu", (4,)) for name in ("torch", "torch-compile"))
    assert "compiled" in fast.describe() and "eager" in eager.describe()
    fast.prepare(["text_encoder", "denoiser", "decoder"], [4])
    with torch.compiler.set_stance("fail_on_recompile"):
        drawn = walk(fast, 3)
    assert levels(drawn, walk(eager, 3)) <= 1


def test_the_pixels_of_a_gpu_are_the_decoders(tiny_student: Path) -> None:
    """The kernel, in its interpreter or as its reference, on what the vae gives."""
    decoder = load_stages(tiny_student, dtype=torch.bfloat16).decoder
    with torch.inference_mode():
        latents = torch.from_numpy(initial_noise(0, 2, (4, 8, 8)))
        latents[1, 0, 0, 0] = torch.nan
        (images, finite), (expected, told) = OnGpu(decoder)(latents), decoder(latents)
    assert torch.equal(images[0], expected[0]) and finite.tolist() == told.tolist() == [True, False]


# errors


def test_what_cannot_be_loaded_is_one_line(tiny_student: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    cases = [
        (partial(Engine.load, tiny_student, backend="onnxruntime"), ArtifactError, "OUT, or take backend 'torch'"),
        (partial(Engine.load, tiny_student, backend="toch"), ArtifactError, "no backend 'toch'; did you mean 'torch'?"),
        (partial(Engine.load, tiny_student, precision="fp4"), ArtifactError, "no precision 'fp4'"),
        (partial(Engine.load, tiny_student, device="gpu"), ArtifactError, "cuda or cuda:N for the backend torch"),
        (partial(Engine.load, tiny_student, device="cpu:1"), ArtifactError, "got 'cpu:1'"),
        (
            partial(Engine.load, tiny_student, max_batch=64),
            RequestError,
            "max_batch must be 1 to 63 for this model, got 64",
        ),
        (partial(Engine.load, tiny_student, max_batch=0), RequestError, "max_batch must be 1 to 63"),
        (partial(Engine.load, tiny_student, sizes=[(60, 64)]), ArtifactError, "a size must be a multiple of 8"),
        (
            partial(Engine.load, tiny_student, backend="torch-graph", device="cpu"),
            ArtifactError,
            "device is cpu; take torch",
        ),
        (partial(Engine.load, tiny_artifact, backend="torch"), ArtifactError, "is an exported artifact, not a student"),
        (partial(Engine.load, tmp_path, backend="torch"), ArtifactError, "is empty; it should hold imagine_flash.json"),
        (partial(Engine.load, tmp_path / "none", backend="torch"), ArtifactError, "does not exist; check the path"),
        (partial(choose, "torch", Engine.load(tiny_artifact).artifact), ArtifactError, "runs a student folder"),
    ]
    if not torch.cuda.is_available():
        cases.append((partial(Engine.load, tiny_student, device="cuda"), ArtifactError, "finds no CUDA"))
    for load, kind, says in cases:
        with pytest.raises(kind) as error:
            load()
        assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("build", [architectures.build_sd21, pipelines.build_pipeline], ids=["linear", "convolutions"])
def test_a_channels_last_unet_stays_so(build: Callable[[], Any]) -> None:
    unet: Any = build().unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    given = (x, torch.tensor([5, 900]), torch.randn(2, 7, 32))
    before, others = unet(*given).sample, list[str]()

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs: (
            None if inputs[0].is_contiguous(memory_format=torch.channels_last) else others.append(name)
        )

    for name, part in unet.named_modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.GroupNorm):
            part.register_forward_pre_hook(watch(name))
    unet(*given)
    assert others, "diffusers does so by itself: keep_channels_last can go"
    others.clear()
    assert keep_channels_last(unet) == 4
    torch.testing.assert_close(unet(*given).sample, before, rtol=1e-4, atol=1e-5)
    assert not others


def test_plans_that_the_schedule_does_not_have(tiny_student: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    pipelines.describe(student, plans={1: [1000]})
    with pytest.raises(ArtifactError, match=r"timestep 1000 is outside the schedule's 0\.\.999"):
        Engine.load(student)


def test_what_only_an_artifact_has(engine: Engine) -> None:
    with pytest.raises(ArtifactError, match="is a student, not an artifact; run: imagine-flash export"):
        next(engine.verify())
    assert not (engine.folder / ARTIFACT_FILE).exists()


def test_a_missing_package_is_named(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers.pipelines.pipeline_utils", None)
    with pytest.raises(MissingExtraError, match=r"needs diffusers: pip install 'imagine-flash\[export\]'"):
        Engine.load(tiny_student)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "torch-graph", "torch-compile"])
def test_every_mode_on_a_gpu_draws_what_the_cpu_draws(name: str, tiny_student: Path) -> None:
    expected, backend = walk(toy_backend(tiny_student, "torch", "cpu"), 3), toy_backend(tiny_student, name, "cuda")
    for _ in range(2):  # convolutions in float32 may compute in TF32 there
        assert levels(walk(backend, 3), expected) <= 2
    assert levels(walk(backend, 1), walk(toy_backend(tiny_student, "torch", "cpu"), 1)) <= 2


@pytest.mark.gpu
def test_requests_on_a_gpu_are_replayed(oracle: Engine, tiny_student: Path) -> None:
    with Engine.load(tiny_student, backend="torch-graph", device="cuda", precision="fp32") as engine:
        engine.warm_up()
        assert "CUDA graphs" in engine.describe()
        for steps in (1, 3, 2):
            assert levels(images(engine, steps=steps, count=3), images(oracle, steps=steps, count=3)) <= 2
    with Engine.load(tiny_student, device="cuda") as engine:
        assert "bf16" in engine.describe()
        assert psnr(images(engine).astype(np.uint8), images(oracle).astype(np.uint8)) > 30


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch-graph", "torch-compile"])
def test_lone_pictures_on_a_gpu_are_right_whatever_came_between(name: str, oracle: Engine, tiny_student: Path) -> None:
    """Memory that a graph reads may be given to nobody else: small and large arrays, other graphs, and cleared workspaces."""
    with Engine.load(tiny_student, backend=name, device="cuda", precision="fp32") as engine:
        engine.warm_up()
        for steps in (1, 2, 3, 1, 3, 2):
            assert levels(images(engine, steps=steps), images(oracle, steps=steps)) <= 2
            images(engine, steps=2, count=3, prompt=f"a fox and {steps} cats")
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            filled = [torch.full((size,), torch.nan, device="cuda") for size in (1, 7, 64, 4096, 2**23) for _ in "abcd"]
            torch.cuda.synchronize()
            del filled


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "torch-graph"])
def test_a_step_does_not_wait_for_the_gpu(name: str, tiny_student: Path) -> None:
    backend = toy_backend(tiny_student, name, "cuda")
    walk(backend, 3)
    conditions = backend.encode({"input_ids": np.arange(16, dtype=np.int64)[None].repeat(3, 0)})
    x, ones, (a, b) = backend.upload(initial_noise(0, 3, (4, 8, 8))), np.ones(3, np.float32), coefficients(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            x = backend.update(x, backend.denoise(x, 500 * ones, conditions), a, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert backend.finite(x).all()
