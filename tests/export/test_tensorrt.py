"""The TensorRT recipe of an artifact, and what building says where there is no TensorRT."""

import json
import shutil

import onnx
import pytest

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.export.tensorrt import batch_profile, build_plans, graphs_to_build, write_plan, write_tensorrt
from imagine_flash.folders.files import hash_files, sha256_file
from imagine_flash.folders.manifests import GraphSpec, TensorSpec
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.folders.tensorrt_plans import BuildRecipe, read_json
from imagine_flash.tests.tensorrt_artifact import (
    GRAPHS,
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
