"""The TensorRT recipe of an artifact, and what building says where there is no TensorRT."""

import json
import shutil
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_model

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.export import tensorrt
from imagine_flash.export.tensorrt import batch_profile, build_plans, graphs_to_build, write_plan, write_tensorrt
from imagine_flash.folders.files import hash_files, sha256_file
from imagine_flash.folders.manifests import GraphSpec, TensorSpec
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.folders.tensorrt_plans import BuildRecipe, find_plan, read_json
from imagine_flash.tests.tensorrt_artifact import (
    GRAPHS,
    HERE,
    NEEDS_TENSORRT,
    NODE,
    WITHOUT_TENSORRT,
    build_artifact,
    flip,
    key_of,
    model,
    tiny_model,
)


@pytest.fixture
def artifact(tmp_path):
    return build_artifact(tmp_path / "artifact")


def test_the_recipe_says_what_a_plan_is_built_from(artifact):
    formats = read_artifact_manifest(artifact).formats
    assert formats == {"tensorrt": {"recipe": "tensorrt/build.json", "parser": "10.15", "graphs": sorted(GRAPHS)}}
    recipe = json.loads((artifact / "tensorrt" / "build.json").read_text())
    assert recipe["flags"] == ["STRONGLY_TYPED"]
    assert recipe["graphs"]["denoiser"] == {
        "file": "denoiser.onnx",
        "weights": ["weights.bin"],
        "profile": {"x": [[1, 4, 8, 8], [4, 4, 8, 8], [4, 4, 8, 8]]},
    }


def test_tensorrt_gets_a_copy_of_what_has_attention(artifact):
    """The same graph but for one attribute, above the same weights; the artifact's own stays as the others run it."""
    own = model(
        [NODE("Mul", ["x", "w"], ["q"]), NODE("Attention", ["q", "x", "x"], ["y"])], tiny_model().graph.initializer
    )
    (artifact / "denoiser.onnx").write_bytes(own.SerializeToString())
    manifest = read_artifact_manifest(artifact, verify=False)
    write_tensorrt(artifact, manifest)
    recipe = json.loads((artifact / "tensorrt" / "build.json").read_text())["graphs"]
    assert [recipe[name]["file"] for name in ("denoiser", "decoder")] == ["tensorrt/denoiser.onnx", "decoder.onnx"]
    assert all(graph["weights"] == ["weights.bin"] for graph in recipe.values())
    copy = onnx.load(artifact / "tensorrt/denoiser.onnx", load_external_data=False)
    assert [a.name for a in copy.graph.node[1].attribute] == ["TRT_decomposable"]
    del copy.graph.node[1].attribute[:]
    assert copy == own and (artifact / "denoiser.onnx").read_bytes() == own.SerializeToString()
    write_manifest(artifact, manifest.model_copy(update={"files": hash_files(artifact)}))
    assert key_of(artifact).graph_sha256 == sha256_file(artifact / "tensorrt/denoiser.onnx")


def test_the_stages_are_built_and_the_whole_sampler_where_it_is_asked_for(tiny_artifact, tmp_path):
    """Six unrolled networks, which nothing reads by default, took most of the time."""
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    manifest = read_artifact_manifest(folder)
    write_tensorrt(folder, manifest)
    recipe = read_json(folder / "tensorrt" / "build.json", BuildRecipe)
    stages = ["text_encoder", "denoiser", "decoder", "image_encoder"]
    assert graphs_to_build(recipe, whole_sampler=False) == stages
    assert graphs_to_build(recipe, whole_sampler=True) == list(manifest.graphs) and len(manifest.graphs) == 10
    alone = recipe.model_copy(update={"graphs": {n: g for n, g in recipe.graphs.items() if n not in stages}})
    assert graphs_to_build(alone, whole_sampler=False) == list(alone.graphs), "where there is nothing else"


@pytest.mark.parametrize(
    ("shape", "batch", "expected"),
    [
        (["batch", 4, 8, 8], (1, 4), ([1, 4, 8, 8], [4, 4, 8, 8], [4, 4, 8, 8])),
        (["batch", 4, 8, 8], (1, 1), ([1, 4, 8, 8],) * 3),
        (["batch"], (2, 3), ([2], [3], [3])),
        ([2, 77], (1, 4), ([2, 77],) * 3),
        ([], (1, 4), ([], [], [])),
    ],
    ids=["a range", "one batch size", "a vector", "nothing free", "a scalar"],
)
def test_profile(shape, batch, expected):
    spec = GraphSpec(file="g.onnx", inputs=[TensorSpec(name="x", dtype="float32", shape=shape)], outputs=[], opset=23)
    assert batch_profile(spec, batch) == {"x": expected}


def test_only_the_batch_may_be_free():
    inputs = [TensorSpec(name="x", dtype="float32", shape=["batch", 4, "height", 8])]
    with pytest.raises(ArtifactError, match=r"g\.onnx: the input 'x' .*'height'.*only its first axis may be free"):
        batch_profile(GraphSpec(file="g.onnx", inputs=inputs, outputs=[], opset=23), (1, 4))


def test_nothing_is_written_for_a_graph_that_cannot_be_parsed(artifact):
    manifest = read_artifact_manifest(artifact)
    shutil.rmtree(artifact / "tensorrt")
    (artifact / "decoder.onnx").write_bytes(model([NODE("Det", ["x"], ["y"])]).SerializeToString())
    with pytest.raises(ArtifactError, match=r"decoder: .*Det \(1 of them\)"):
        write_tensorrt(artifact, manifest)
    assert not (artifact / "tensorrt").exists()


@WITHOUT_TENSORRT
def test_without_tensorrt_one_line_says_what_to_do(artifact):
    write_plan(artifact, key_of(artifact), b"plan")
    with pytest.raises(MissingExtraError) as error:
        build_plans(artifact)
    assert str(error.value) == NEEDS_TENSORRT.format(artifact)


def test_a_damaged_artifact_is_not_built(artifact):
    flip(artifact / "weights.bin")
    with pytest.raises(ArtifactError, match=r"weights\.bin differs from the sha256"):
        build_plans(artifact)


class EmulatedTensorrt:
    """As much of TensorRT as a build asks for. Its parser reads weights as TensorRT's does: from the folder of the path that it is
    told, and none from above it. What it was given is kept."""

    def __init__(self) -> None:
        self.parsed: list[onnx.ModelProto] = []
        self.profiles: list[dict[str, tuple]] = []
        self.flags: list[Any] = []
        self.module: Any = ModuleType("tensorrt")
        self.module.ILogger = type("ILogger", (), {"Severity": Enum("Severity", "INTERNAL_ERROR ERROR")})
        self.module.NetworkDefinitionCreationFlag = Enum("Flag", {"STRONGLY_TYPED": 1}, type=int)
        self.module.BuilderFlag = Enum("BuilderFlag", "VERSION_COMPATIBLE REFIT")
        self.module.Builder, self.module.OnnxParser = self.builder, self.parser

    def builder(self, logger: Any) -> Any:
        config = SimpleNamespace(
            add_optimization_profile=self.profiles.append,
            set_flag=lambda flag: self.flags.append(flag.name),
            create_timing_cache=lambda known: known,
            set_timing_cache=lambda cache, ignore_mismatch: True,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )
        return SimpleNamespace(
            create_network=lambda flags: flags,
            create_builder_config=lambda: config,
            create_optimization_profile=Profile,
            build_serialized_network=lambda network, config: b"plan",
        )

    def parser(self, network: int, logger: Any) -> Any:
        assert network == 1 << 1

        def parse(model: bytes, path: str) -> bool:
            self.parsed.append(onnx.load_from_string(model))
            load_external_data_for_model(self.parsed[-1], str(Path(path).parent))
            return True

        return SimpleNamespace(parse=parse)


class Profile(dict):
    def set_shape(self, name: str, low: tuple, best: tuple, high: tuple) -> None:
        self[name] = (low, best, high)


def test_what_the_builder_is_given(artifact, monkeypatch):
    own = model(
        [NODE("Mul", ["x", "w"], ["q"]), NODE("Attention", ["q", "x", "x"], ["y"])], tiny_model().graph.initializer
    )
    (artifact / "denoiser.onnx").write_bytes(own.SerializeToString())
    manifest = read_artifact_manifest(artifact, verify=False)
    write_tensorrt(artifact, manifest)
    write_manifest(artifact, manifest.model_copy(update={"files": hash_files(artifact)}))
    trt = EmulatedTensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", trt.module)
    monkeypatch.setattr(tensorrt, "this_machine", lambda folder: HERE)
    told: list[str] = []
    (plan,) = build_plans(artifact, graphs=["denoiser"], progress=told.append)
    (parsed,) = trt.parsed
    assert [a.name for a in parsed.graph.node[1].attribute] == ["TRT_decomposable"]
    assert np.array_equal(onnx.numpy_helper.to_array(parsed.graph.initializer[0]).ravel(), np.arange(4))
    lone, rest = (1, 4, 8, 8), ((2, 4, 8, 8), (4, 4, 8, 8), (4, 4, 8, 8))
    assert trt.profiles == [{"x": (lone, lone, lone)}, {"x": rest}]
    assert find_plan(artifact, "denoiser", machine=HERE) == plan and plan.read_bytes() == b"plan"
    record = json.loads(plan.with_suffix(".json").read_text())
    assert record["driver"] == HERE.driver and "driver" not in record["key"]
    assert (artifact / "tensorrt" / f"timing_sm_90_trt{HERE.tensorrt}.cache").read_bytes() == b"timings"
    newer = HERE.model_copy(update={"driver": "590.1"})
    monkeypatch.setattr(tensorrt, "this_machine", lambda folder: newer)
    assert build_plans(artifact, graphs=["denoiser"], progress=told.append) == [plan]
    assert told == [f"building {plan.name}", f"{plan.name} is there"] and len(trt.parsed) == 1 and not trt.flags
    (other,) = build_plans(artifact, graphs=["denoiser"], refit=True, version_compatible=True)
    assert other != plan and sorted(trt.flags) == ["REFIT", "VERSION_COMPATIBLE"]
    flags = json.loads(other.with_suffix(".json").read_text())["key"]["flags"]
    assert flags == ["REFIT", "STRONGLY_TYPED", "VERSION_COMPATIBLE"]
