"""Matrices of a student in 8 bits: which they are, that pictures stay alike, and what is refused."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.core.images import psnr
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends import torch_quantised
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.torch import load_student
from imagine_flash.engine.backends.torch_quantised import computes_in
from imagine_flash.engine.loading import LoadOptions, check_loading
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.tests import architectures

TORCHAO = importlib.util.find_spec("torchao") is not None


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With linear projections of widths that the kernels take."""
    return architectures.build_student("sd21", tmp_path_factory.mktemp("student") / "student")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_quantised, "SMALL", 2**8)


@pytest.fixture
def with_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed: what is tested comes before it, or instead of it."""
    monkeypatch.setattr(torch_quantised, "find_spec", lambda name: name)


def test_which_matrices(small: None) -> None:
    """Those that latents pass: neither the embedding of the timestep, nor what is read of the text, nor what is too small."""
    pipeline = architectures.build_sd21()
    stages = stages_of(pipeline)
    network: Any = stages.denoiser(stages.default_size).eval()
    with torch.inference_mode():
        text = stages.text_encoder(*stages.example_tokens(1).values())
        inputs = [torch.zeros(1, *stages.latent_shape(stages.default_size)), torch.tensor([999.0]), *text]
        chosen = torch_quantised._worth_it(network, lambda given: [network(*given)], inputs)
    names = {name for name, part in network.named_modules() if part in chosen}
    ends = {name.partition("transformer_blocks.0.")[2] for name in names}
    assert ends == {
        *(f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")),
        *("attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", ""),
    }
    assert {name.rpartition(".")[2] for name in names if "transformer_blocks" not in name} == {"proj_in", "proj_out"}
    assert not any(hook for part in network.modules() for hook in part._forward_pre_hooks.values())


@pytest.mark.skipif(not TORCHAO, reason="torchao is not installed: the extra torchao")
def test_pictures_stay_alike(student: Path, small: None) -> None:
    request = GenerateRequest(prompt="a cat on pink", seed=3, steps=2, count=2)
    drawn = []
    for precision in ("fp32", "int8"):
        with Engine.load(student, device="cpu", precision=precision) as engine:
            drawn.append(engine.generate(request).images)
    assert "fp32 with matrices in int8, eager" in engine.describe()
    assert 30 < psnr(*drawn) < 100


@pytest.mark.skipif(not TORCHAO, reason="torchao is not installed: the extra torchao")
def test_fused_projections_are_in_eight_bits_too(student: Path, small: None) -> None:
    """Fused before, since torchao's weights cannot be put together."""
    options = BackendOptions(device="cpu", precision="int8", autotune=True)
    backend, _, _ = load_student(student, "torch-compile", options, None)
    unet: Any = backend._networks["denoiser"].denoiser.unet  # type: ignore[attr-defined]
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    assert type(block.attn1.to_qkv.weight).__name__ == "Int8Tensor"
    assert type(block.attn2.to_kv.weight) is torch.nn.Parameter, "what is read of the text stays"
    with torch.inference_mode():
        run: Any = backend.open("denoiser", 0)
        (m,) = run(backend.example("denoiser", 1))
    assert torch.isfinite(m).all()


def test_pictures_that_differ_are_refused(
    student: Path, small: None, with_torchao: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(scheme: str, network: torch.nn.Module, chosen: set[torch.nn.Module]) -> None:
        for part in chosen:
            part.weight.data.normal_()  # type: ignore[union-attr,operator]

    monkeypatch.setattr(torch_quantised, "_put_in", ruin)
    with pytest.raises(
        ArtifactError, match=r"student in int8 draws a picture \d+\.\d dB from its own, and the least is 20;"
    ):
        Engine.load(student, device="cpu", precision="int8")


def test_what_cannot_be_in_eight_bits(student: Path, tiny_student: Path, with_torchao: None) -> None:
    cpu = torch.device("cpu")
    cases: list[tuple[Callable[[], Any], str]] = [
        (partial(Engine.load, student, device="cpu", precision="int8"), "student has no matrix large enough for int8"),
        (
            partial(Engine.load, student, device="cpu", precision="fp8"),
            "capability 8.9 or later, and cpu is none; take int8",
        ),
        (partial(check_loading, student, LoadOptions(device="cpu", precision="fp8")), "fp8 needs a GPU"),
        (
            partial(computes_in, BackendOptions(precision="int8", loras={"a": "a.safetensors"}), cpu),
            "torch swaps no LoRAs in int8; take fp32 or bf16",
        ),
        (partial(Engine.load, precision="fp8"), "does not compute in fp8; take a student, which torch draws"),
        (partial(check_loading, None, LoadOptions(precision="fp8")), "does not compute in fp8"),
    ]
    for load, says in cases:
        with pytest.raises(ArtifactError) as error:
            load()
        assert says in str(error.value) and "\n" not in str(error.value)


def test_an_older_gpu_has_no_fp8(with_torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here, asked = torch.device("cuda", 0), BackendOptions(precision="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ArtifactError, match=r"8\.9 or later, and cuda:0 has 8\.6; take int8"):
        computes_in(asked, here)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert computes_in(asked, here) == ("bf16", "fp8")
    assert computes_in(BackendOptions(precision="int8"), here) == ("bf16", "int8")
    assert computes_in(BackendOptions(), here) == ("bf16", None)


def test_without_torchao_the_extra_is_named(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_quantised, "find_spec", lambda name: None)
    for load in (Engine.load, lambda folder, **options: check_loading(folder, LoadOptions(**options))):
        with pytest.raises(MissingExtraError, match=r"needs torchao: pip install 'imagine-flash\[torchao\]'"):
            load(student, device="cpu", precision="int8")


@pytest.mark.gpu
@pytest.mark.skipif(not TORCHAO, reason="torchao is not installed: the extra torchao")
@pytest.mark.parametrize("name", ["torch", "torch-graph", "torch-compile"])
def test_fp8_on_a_gpu(name: str, student: Path, small: None) -> None:
    if torch.cuda.get_device_capability() < torch_quantised.FP8_CAPABILITY:
        pytest.skip("this GPU does not multiply float8")
    request, drawn = GenerateRequest(prompt="a cat on pink", seed=3, steps=2), []
    for precision in ("bf16", "fp8"):
        with Engine.load(student, backend=name, device="cuda", precision=precision) as engine:
            drawn.append(engine.generate(request).images)
    assert "bf16 with matrices in fp8" in engine.describe() and 20 < psnr(*drawn) < 100
