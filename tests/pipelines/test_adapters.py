"""LoRAs beside weights that stay: the same sums as fused ones, in every format, also where the weights are elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch

from imagine_flash.core.errors import ArtifactError
from imagine_flash.folders.files import NETWORKS_FILE
from imagine_flash.pipelines.adapters import Rewriter, read_adapters
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.pipelines.lora import Lora, fuse
from imagine_flash.pipelines.skeleton import read_networks, write_networks
from imagine_flash.tests import architectures, pipelines
from imagine_flash.tests.export.test_lora import FORMATS, factors  # noqa: F401  (a fixture)


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": values.detach().clone()
        for part in ("unet", "text_encoder")
        for name, values in getattr(pipeline, part).named_parameters()
    }


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_written_is_fused(tmp_path: Path, factors: Any, write: Any) -> None:  # noqa: F811
    path, _ = write(tmp_path, factors)
    swapped, fused = pipelines.build_pipeline(), pipelines.build_pipeline()
    before = weights(swapped)
    addresses = [values.data_ptr() for values in swapped.unet.parameters()]
    rewriter = Rewriter(read_adapters(swapped, "unet", {"a": str(path)}))
    assert all(torch.equal(values, before[name]) for name, values in weights(swapped).items()), "nothing is written yet"
    fuse(fused, "unet", Lora(str(path), 0.5))
    rewriter.write({"a": 0.5})
    expected = weights(fused)
    assert any(not torch.equal(values, before[name]) for name, values in expected.items())
    for name, values in weights(swapped).items():
        torch.testing.assert_close(values, expected[name])
    rewriter.write({})
    assert all(torch.equal(values, before[name]) for name, values in weights(swapped).items())
    assert [values.data_ptr() for values in swapped.unet.parameters()] == addresses


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_configs_are_enough_to_read_them(tmp_path: Path, factors: Any, write: Any) -> None:  # noqa: F811
    path, _ = write(tmp_path, factors)
    pipeline = pipelines.build_pipeline()
    write_networks(tmp_path, pipeline, stages_of(pipeline))
    skeleton, _ = read_networks(tmp_path)
    found, expected = (read_adapters(one, "unet", {"a": str(path)})["a"] for one in (skeleton, pipeline))
    assert found.stages == expected.stages and found.layers.keys() == expected.layers.keys()
    for layer in expected.layers:
        assert torch.equal(found.delta(layer), expected.delta(layer))


@pytest.mark.parametrize("kind", architectures.DRAWN)
def test_every_class_is_built_again_from_its_configs(tmp_path: Path, kind: str) -> None:
    """With its layers where they were, and without a word of where it came from."""
    pipeline = architectures.DRAWN[kind]()
    stages = stages_of(pipeline)
    write_networks(tmp_path, pipeline, stages)
    skeleton, paths = read_networks(tmp_path)
    assert type(skeleton) is type(pipeline) and "_name_or_path" not in (tmp_path / NETWORKS_FILE).read_text()

    def shapes(module: torch.nn.Module) -> dict[str, Any]:
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        return {name: one.weight.shape for name, one in module.named_modules() if isinstance(one, kinds)}

    for component, path in paths.items():
        assert shapes(getattr(skeleton, component)) == shapes(getattr(pipeline, component)) != {}
        holder = stages.text_encoder if component.startswith("text") else stages.denoiser(stages.default_size)
        assert shapes(holder.get_submodule(path)) == shapes(getattr(pipeline, component))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"pipeline": "AutoPipeline"}', "cannot read a AutoPipeline"),
        ('{"pipeline": "FluxPipeline", "networks": {"a": {"library": "os", "class": "system", "config": {}}}}', "'os'"),
        (
            '{"pipeline": "FluxPipeline", "networks": {"a": {"library": "diffusers", "class": "FluxPipeline"}}}',
            "is no network",
        ),
        ("[", "cannot be built here"),
    ],
)
def test_configs_of_somebody_build_networks_alone(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / NETWORKS_FILE).write_text(text)
    with pytest.raises(ArtifactError, match=says) as raised:
        read_networks(tmp_path)
    assert "\n" not in str(raised.value)
