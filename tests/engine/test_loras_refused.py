"""LoRAs by request that cannot be: what is asked for, given or loaded wrongly, in one line each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagine_flash.core.errors import ArtifactError, RequestError
from imagine_flash.engine import Engine
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.openvino import OpenvinoBackend
from imagine_flash.engine.loading import LoadOptions, check_loading
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.tests import architectures
from imagine_flash.tests.engine.conftest import Model, ask
from imagine_flash.tests.loras import ATTENTION, write_lora


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"pixe": 1.0}, r"no LoRA 'pixe'; did you mean 'pixel'\?; it has ink, pixel"),
        ({"x" * 1000: 1.0}, r"no LoRA 'x{100}'; it has ink, pixel"),
        ({"pixel": float("nan")}, r"lora must be a weight from -20 to 20 by name, such as .*, got nan"),
        ({"pixel": 21}, r"lora must be .*, got 21"),
        ({"pixel": "much"}, r"lora must be .*, got 'much'"),
        ({"pixel": True}, r"lora must be .*, got True"),
        (["pixel"], r"lora must be .*, got \['pixel'\]"),
    ],
)
def test_a_request_that_cannot_be(lora_engine: Engine, lora: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"^{says}$") as raised:
        lora_engine.generate(ask(lora))
    assert raised.value.param == "lora"


def test_an_engine_without_any_says_so(tiny_artifact: Path) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        assert engine.loras == []
        with pytest.raises(RequestError, match="no LoRA 'pixel'; none was loaded"):
            engine.generate(ask({"pixel": 1.0}))


def zero(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sd15"](), {"unet": ATTENTION}, scale=0.0)


def not_finite(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sd15"](), {"unet": ATTENTION}, scale=float("nan"))


def of_another_base(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sdxl"](), {"unet": ATTENTION})


def more_than_factors(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sd15"](), {"unet": ATTENTION}, use_dora=True)


def nothing(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (zero, "changes no weight: its own are zero"),
        (not_finite, "holds NaN or Inf, in .*to_"),
        (of_another_base, "does not fit this StableDiffusionPipeline"),
        (more_than_factors, "is more than two factors in unet.*as DoRA is; fuse it: imagine-flash export --lora"),
        (nothing, "there is no LoRA .*give a .safetensors file, a folder or a hub id"),
    ],
)
def test_a_lora_that_cannot_be_swapped(
    lora_model: Model, tmp_path: Path, write: Callable[[Path], Path], says: str
) -> None:
    with pytest.raises(ArtifactError, match=says) as raised:
        Engine.load(lora_model.student, backend="torch", loras={"pixel": write(tmp_path / "lora")})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loras": {"a:b": "x"}}, r"loras: a LoRA's name has up to 100 letters.*got 'a:b'; NAME=PATH gives one"),
        ({"loras": {"": "x"}}, r"a LoRA's name has"),
        ({"loras": {"a": "x"}, "route": "sampler"}, r"whole-sampler graphs have their weights for good"),
        (
            {"loras": {"a": "x"}, "backend": "tensorrt"},
            r"LoRAs are not swapped in TensorRT plans; take the student with",
        ),
        ({"loras": {"a": "x"}, "backend": "onnxruntime"}, r"there is no LoRA x"),
    ],
)
def test_an_engine_that_cannot_be(tiny_artifact: Path, options: Any, says: str) -> None:
    with pytest.raises((ArtifactError, RequestError), match=says):
        Engine.load(tiny_artifact, **options)


def test_what_is_in_8_bits_is_not_swapped(tiny_artifact: Path) -> None:
    pytest.importorskip("openvino", reason="its precisions are asked for")
    manifest = read_artifact_manifest(tiny_artifact)
    in_8_bits = manifest.model_copy(update={"formats": {"openvino": {"weights": "int8_sym"}}})
    for precision, loras, expected in (("auto", {}, "int8"), ("auto", {"a": "x"}, "fp32"), ("int8", {"a": "x"}, None)):
        options = BackendOptions(precision=precision, loras=loras)
        if expected is None:
            with pytest.raises(ArtifactError, match="OpenVINO swaps no LoRAs in int8; take fp32 or bf16"):
                OpenvinoBackend.check(tiny_artifact, in_8_bits, options)
        else:
            assert OpenvinoBackend.check(tiny_artifact, in_8_bits, options)[2] == expected


def test_whole_samplers_alone_have_nothing_to_swap(tiny_artifact: Path, lora_model: Model) -> None:
    from imagine_flash.engine.backends.fed_weights import FedWeights
    from imagine_flash.folders.reading import read_artifact_manifest

    manifest = read_artifact_manifest(tiny_artifact)
    whole = {name: graph for name, graph in manifest.graphs.items() if name.startswith("sampler")}
    with pytest.raises(ArtifactError, match="has no graph of a stage that the LoRA 'ink' changes"):
        FedWeights(tiny_artifact, manifest.model_copy(update={"graphs": whole}), {"ink": lora_model.loras["ink"]})


def test_an_artifact_of_before_is_told_apart(tiny_artifact: Path, tmp_path: Path) -> None:
    from imagine_flash.engine.backends.fed_weights import FedWeights
    from imagine_flash.folders.reading import read_artifact_manifest

    for path in tiny_artifact.glob("*.onnx"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ArtifactError, match=r"does not say what its networks are made of.*export the student again"):
        FedWeights(tmp_path, read_artifact_manifest(tiny_artifact), {"a": "x"})


def test_a_file_of_a_repository_may_be_named(tiny_artifact: Path) -> None:
    """Loading fetches it; until then nothing is wrong with it."""
    check_loading(tiny_artifact, LoadOptions(loras={"ink": "owner/name/ink.safetensors"}))
    with pytest.raises(ArtifactError, match=r"lora ink: there is no \./name/ink.safetensors"):
        check_loading(tiny_artifact, LoadOptions(loras={"ink": "./name/ink.safetensors"}))
