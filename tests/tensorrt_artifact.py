"""The smallest artifact with a TensorRT recipe, and what its tests do to it: no pipeline is exported, no TensorRT is needed.

A module, not fixtures, so that each test file takes what it uses: `from imagine_flash.tests.tensorrt_artifact import key_of`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from imagine_flash.export.tensorrt import write_tensorrt
from imagine_flash.folders.files import hash_files, sha256_file
from imagine_flash.folders.manifests import ArtifactManifest, GraphSpec, TensorSpec, TokenizerSpec
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.folders.tensorrt_plans import BuildRecipe, Machine, plan_key

HERE = Machine(sm="sm_90", driver="580.65.06", tensorrt="10.16.1.11")
GRAPHS = ("text_encoder", "denoiser", "decoder")
LATENTS = ("batch", 4, 8, 8)
NODE = helper.make_node
WITHOUT_TENSORRT = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
NEEDS_TENSORRT = (  # .format(artifact)
    "needs tensorrt: pip install 'imagine-flash[tensorrt]', in a checkout '.[tensorrt]' (pip install tensorrt; it comes "
    "from https://pypi.nvidia.com), then run 'imagine-flash build-tensorrt {}' on the machine with the GPU"
)


def tiny_model() -> onnx.ModelProto:
    """y = x * w with w of 4 channels, in a weights file."""
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(4, 1, 1), data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "0", "length": "16"}.items():
        w.external_data.add(key=key, value=value)
    return model([NODE("Mul", ["x", "w"], ["y"])], [w])


def model(nodes, initializers=(), opset=23, kind=TensorProto.FLOAT, shape=LATENTS, out=TensorProto.FLOAT):
    x, y = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", out, None)
    graph = helper.make_graph(nodes, "g", [x], [y], list(initializers))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def build_artifact(folder: Path) -> Path:
    """The smallest artifact folder that is read: three graphs with one weights file, and the recipe."""
    folder.mkdir()
    (folder / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (folder / "tokenizer.json").write_text("{}")
    for name in GRAPHS:
        (folder / f"{name}.onnx").write_bytes(tiny_model().SerializeToString())
    x = TensorSpec(name="x", dtype="float32", shape=list(LATENTS))
    y = TensorSpec(name="y", dtype="float32", shape=list(LATENTS))
    graphs = {name: GraphSpec(file=f"{name}.onnx", inputs=[x], outputs=[y], opset=23) for name in GRAPHS}
    manifest = ArtifactManifest(
        name="tiny",
        created_with={},
        prediction_type="v_prediction",
        scheduler={"_class_name": "DDIMScheduler"},
        plans={1: [999]},
        noise_correction=True,
        latent_channels=4,
        downscale=8,
        sizes=[(64, 64)],
        batch=(1, 4),
        scaling_factor=1.0,
        tokenizers=[TokenizerSpec(file="tokenizer.json", context_length=8)],
        graphs=graphs,
        files=hash_files(folder),
        parity={},
        student_sha256="0" * 64,
    )
    formats = {"tensorrt": write_tensorrt(folder, manifest)}
    write_manifest(folder, manifest.model_copy(update={"formats": formats, "files": hash_files(folder)}))
    return folder


def key_of(folder: Path, machine: Machine = HERE, flags=(), graph="denoiser"):
    manifest = read_artifact_manifest(folder)
    recipe = BuildRecipe.model_validate_json((folder / "tensorrt" / "build.json").read_bytes())
    return plan_key(manifest, recipe, graph, machine, flags)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rehash(folder: Path, **update) -> None:
    """A manifest that fits the changed files, as another export would have written it."""
    manifest = read_artifact_manifest(folder, verify=False)
    files = {name: sha256_file(folder / name) for name in manifest.files}
    write_manifest(folder, manifest.model_copy(update={"files": files, **update}))
