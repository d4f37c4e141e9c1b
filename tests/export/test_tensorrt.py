"""TensorRT plans, as far as they can be checked without TensorRT: recipes, keys, messages, and the names of its real bindings."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from imagine_flash.core.artifact import (
    ArtifactManifest,
    GraphSpec,
    TensorSpec,
    TokenizerSpec,
    hash_files,
    read_artifact_manifest,
    sha256_file,
    write_manifest,
)
from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.core.tensorrt_plans import BuildRecipe, Machine, find_plan, plan_key
from imagine_flash.export.tensorrt import batch_profile, build_plans, write_plan, write_tensorrt
from imagine_flash.export.tensorrt_operators import OPERATORS, check_graph

ROOT = Path(__file__).parents[2]
EMBEDDED = sorted((ROOT / "assets" / "emoji" / "artifact").glob("*.onnx"))
HERE = Machine(sm="sm_90", driver="580.65.06", tensorrt="10.16.1.11")
GRAPHS = ("text_encoder", "denoiser", "decoder")
LATENTS = ("batch", 4, 8, 8)
NODE = helper.make_node


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


@pytest.fixture
def artifact(tmp_path):
    """The smallest artifact folder that is read: three graphs with one weights file, and the recipe."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (folder / "tokenizer.json").write_text("{}")
    for name in GRAPHS:
        (folder / f"{name}.onnx").write_bytes(tiny_model().SerializeToString())
    x = TensorSpec(name="x", dtype="float32", shape=list(LATENTS))
    y = TensorSpec(name="y", dtype="float32", shape=list(LATENTS))
    graphs = {name: GraphSpec(file=f"{name}.onnx", inputs=[x], outputs=[y], opset=23) for name in GRAPHS}
    manifest = ArtifactManifest(
        name="tiny", created_with={}, prediction_type="v_prediction", scheduler={"_class_name": "DDIMScheduler"},
        plans={1: [999]}, noise_correction=True, latent_channels=4, downscale=8, sizes=[(64, 64)], batch=(1, 4),
        scaling_factor=1.0, tokenizers=[TokenizerSpec(file="tokenizer.json", context_length=8)], graphs=graphs,
        files=hash_files(folder), parity={}, student_sha256="0" * 64,
    )  # fmt: skip
    formats = {"tensorrt": write_tensorrt(folder, manifest)}
    write_manifest(folder, manifest.model_copy(update={"formats": formats, "files": hash_files(folder)}))
    return folder


def key_of(folder: Path, machine: Machine = HERE, flags=(), graph="denoiser"):
    manifest = read_artifact_manifest(folder)
    recipe = BuildRecipe.model_validate_json((folder / "tensorrt" / "build.json").read_bytes())
    return plan_key(manifest, recipe, graph, machine, flags)


# the recipe


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


# operators


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: path.stem)
def test_the_embedded_graphs_pass(path):
    check_graph(path.stem, onnx.load(path, load_external_data=False))


def test_the_table_holds_what_torch_exports():
    assert EMBEDDED and len(OPERATORS) == 158
    for operator in ("Attention", "Conv", "GroupNormalization", "LayerNormalization", "MatMul", "Softmax"):
        assert OPERATORS[operator] >= {"FP32", "FP16", "BF16"}
    assert "Swish" not in OPERATORS and "BitShift" not in OPERATORS
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert OPERATORS.keys() - known == {"ParametricSoftplus", "ScaledTanh", "ImageScaler"}, "removed from ONNX long ago"


def attention(q=LATENTS, outputs=("y",), **attributes):
    return model([NODE("Attention", ["x", "x", "x"], outputs, **attributes)], shape=q)


BAD_GRAPHS = [
    (model([NODE("Det", ["x"], ["a"]), NODE("Det", ["x"], ["y"])]), r"Det \(2 of them\)"),
    (model([NODE("Gelu", ["x"], ["y"], domain="com.microsoft")]), r"com\.microsoft\.Gelu \(1 of them\)"),
    (model([NODE("Mul", ["x", "x"], ["y"])], kind=TensorProto.DOUBLE), r"Mul of DOUBLE \(1 of them\)"),
    (model([NODE("Transpose", ["x"], ["y"])], kind=TensorProto.UINT8), r"Transpose of UINT8 \(1 of them\)"),
    (model([NODE("Cast", ["x"], ["y"], to=TensorProto.UINT16)], out=TensorProto.UINT16), "Cast of UINT16"),
    (model([NODE("Relu", ["x"], ["y"])], opset=8), "opset 8, but"),
    (model([NODE("Relu", ["x"], ["y"])], opset=25), "opset 25, but TensorRT's ONNX parser takes 9 to 24"),
    (attention(("batch", 8, 16), q_num_heads=2, kv_num_heads=2), "Attention of other than 4 axes"),
    (attention(softcap=30.0), "Attention with a cache, softcap"),
    (attention(outputs=("y", "k", "v")), "Attention with a cache, softcap or a second output"),
]


@pytest.mark.parametrize(("graph", "message"), BAD_GRAPHS)
def test_what_the_parser_does_not_list_is_named(graph, message):
    with pytest.raises(ArtifactError, match=f"^denoiser: .*{message}") as error:
        check_graph("denoiser", graph)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "graph",
    [
        attention(),
        model([NODE("Mul", ["x", "x"], ["y"])], kind=TensorProto.BFLOAT16, out=TensorProto.BFLOAT16),
        model([NODE("Cast", ["x"], ["y"], to=TensorProto.UINT8)], out=TensorProto.UINT8),
        model([NODE("IsNaN", ["x"], ["n"]), NODE("Where", ["n", "x", "x"], ["y"])]),
    ],
    ids=["4-axis attention", "bfloat16", "uint8 pictures", "a bool condition"],
)
def test_what_the_parser_lists_passes(graph):
    check_graph("denoiser", graph)


def test_nothing_is_written_for_a_graph_that_cannot_be_parsed(artifact):
    manifest = read_artifact_manifest(artifact)
    shutil.rmtree(artifact / "tensorrt")
    (artifact / "decoder.onnx").write_bytes(model([NODE("Det", ["x"], ["y"])]).SerializeToString())
    with pytest.raises(ArtifactError, match=r"decoder: .*Det \(1 of them\)"):
        write_tensorrt(artifact, manifest)
    assert not (artifact / "tensorrt").exists()


# keys and plans


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rehash(folder: Path, **update) -> None:
    """A manifest that fits the changed files, as another export would have written it."""
    manifest = read_artifact_manifest(folder, verify=False)
    files = {name: sha256_file(folder / name) for name in manifest.files}
    write_manifest(folder, manifest.model_copy(update={"files": files, **update}))


def changed_batch(folder: Path) -> None:
    write_tensorrt(folder, read_artifact_manifest(folder).model_copy(update={"batch": (1, 5)}))


CHANGES = {
    "a byte of the graph": (lambda folder: flip(folder / "denoiser.onnx"), "graph_sha256"),
    "a byte of the weights": (lambda folder: flip(folder / "weights.bin"), "weights_sha256"),
    "the profile": (changed_batch, "profile"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_plan_is_made_from_changes_its_name(artifact, change):
    act, field = change
    before = key_of(artifact)
    write_plan(artifact, before, b"plan")
    act(artifact)
    rehash(artifact)
    after = key_of(artifact)
    assert before.file != after.file
    assert [f for f in before.model_dump() if getattr(before, f) != getattr(after, f)] == [field]
    with pytest.raises(ArtifactError, match=f"no TensorRT plan of 'denoiser' fits: {field} differs; run"):
        find_plan(artifact, "denoiser", machine=HERE)


def test_every_machine_and_flag_has_its_own_name(artifact):
    machines = [HERE, *(HERE.model_copy(update={field: "10.3"}) for field in Machine.model_fields)]
    flags = [(), ("REFIT",), ("VERSION_COMPATIBLE",), ("REFIT", "VERSION_COMPATIBLE")]
    names = {key_of(artifact, machine, chosen).file for machine in machines for chosen in flags}
    assert len(names) == 16
    assert key_of(artifact).file == key_of(artifact).file
    assert re.fullmatch(r"denoiser_sm_90_trt10\.16\.1\.11_[0-9a-f]{16}\.plan", key_of(artifact).file)
    assert key_of(artifact, flags=("REFIT",)).flags == ["REFIT", "STRONGLY_TYPED"]


def test_a_plan_is_found_and_checked(artifact):
    assert find_plan(artifact, "denoiser") is None  # without asking for TensorRT
    refit = write_plan(artifact, key_of(artifact, flags=("REFIT",)), b"refittable")
    assert find_plan(artifact, "denoiser", machine=HERE) == refit
    plain = write_plan(artifact, key_of(artifact), b"plain")
    assert find_plan(artifact, "denoiser", machine=HERE) == plain, "the one without flags goes first"
    assert find_plan(artifact, "decoder", machine=HERE) is None
    read_artifact_manifest(artifact)  # plans do not disturb the artifact's hashes
    flip(plain)
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(plain))} differs from its sha256; delete it and run"):
        find_plan(artifact, "denoiser", machine=HERE)
    plain.unlink()
    assert find_plan(artifact, "denoiser", machine=HERE) == refit, "a record without its plan counts as not there"


@pytest.mark.parametrize(
    ("there", "flags", "message"),
    [
        ({"sm": "sm_80"}, (), "sm is sm_90 here and sm_80 in the plan; run 'imagine-flash build-tensorrt"),
        ({"driver": "570.1"}, (), "driver is 580.65.06 here and 570.1 in the plan"),
        ({"tensorrt": "10.15.1.29"}, (), "tensorrt is 10.16.1.11 here and 10.15.1.29 in the plan"),
        ({"tensorrt": "10.15.1.29"}, ("VERSION_COMPATIBLE",), None),
        ({"tensorrt": "10.16.2.0"}, ("VERSION_COMPATIBLE",), "tensorrt is 10.16.1.11 here and 10.16.2.0"),
        ({"tensorrt": "9.3.0"}, ("VERSION_COMPATIBLE",), "tensorrt is 10.16.1.11 here and 9.3.0"),
        ({"tensorrt": "10.9.0", "sm": "sm_80"}, ("VERSION_COMPATIBLE",), "fits: sm is sm_90 here and sm_80"),
    ],
)
def test_plans_of_another_machine(artifact, there, flags, message):
    plan = write_plan(artifact, key_of(artifact, HERE.model_copy(update=there), flags), b"plan")
    if message is None:
        assert find_plan(artifact, "denoiser", machine=HERE) == plan
        return
    with pytest.raises(ArtifactError, match=re.escape(message)):
        find_plan(artifact, "denoiser", machine=HERE)


def test_the_nearest_plan_is_named(artifact):
    write_plan(artifact, key_of(artifact, Machine(sm="sm_80", driver="1", tensorrt="11.0")), b"far")
    write_plan(artifact, key_of(artifact, HERE.model_copy(update={"sm": "sm_120"})), b"near")
    with pytest.raises(ArtifactError, match="fits: sm is sm_90 here and sm_120 in the plan; run"):
        find_plan(artifact, "denoiser", machine=HERE)


def test_damaged_recipes_and_records(artifact):
    with pytest.raises(ArtifactError, match=r"no TensorRT recipe for the graph 'denoisr'; did you mean 'denoiser'\?"):
        key_of(artifact, graph="denoisr")
    key = key_of(artifact)
    write_plan(artifact, key, b"plan").with_suffix(".json").write_text("{")
    with pytest.raises(ArtifactError, match=r"denoiser_sm_90.*\.json: Invalid JSON.*delete it"):
        find_plan(artifact, "denoiser", machine=HERE)
    recipe = artifact / "tensorrt" / "build.json"
    recipe.write_text(recipe.read_text().replace("weights.bin", "other.bin"))
    rehash(artifact)
    with pytest.raises(ArtifactError, match=r"build\.json uses 'other.bin', which the manifest does not list"):
        key_of(artifact)
    write_plan(artifact, key, b"plan")
    manifest = read_artifact_manifest(artifact)
    files = {name: digest for name, digest in manifest.files.items() if name != "tensorrt/build.json"}
    write_manifest(artifact, manifest.model_copy(update={"files": files}))
    recipe.unlink()
    with pytest.raises(ArtifactError, match=r"build\.json is missing; export again with the format 'tensorrt'"):
        find_plan(artifact, "denoiser", machine=HERE)


# without TensorRT


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
@pytest.mark.parametrize("ask", [build_plans, lambda folder: find_plan(folder, "denoiser")], ids=["build", "find"])
def test_without_tensorrt_one_line_says_what_to_do(artifact, ask):
    write_plan(artifact, key_of(artifact), b"plan")
    with pytest.raises(MissingExtraError) as error:
        ask(artifact)
    assert str(error.value) == (
        "needs tensorrt: pip install 'imagine-flash[tensorrt]', in a checkout '.[tensorrt]' (pip install tensorrt; it comes "
        f"from https://pypi.nvidia.com), then run 'imagine-flash build-tensorrt {artifact}' on the machine with the GPU"
    )


def test_a_damaged_artifact_is_not_built(artifact):
    flip(artifact / "weights.bin")
    with pytest.raises(ArtifactError, match=r"weights\.bin differs from the sha256"):
        build_plans(artifact)


# the real bindings of both major versions, above libraries that answer nothing

USERS = ("core/tensorrt_plans.py", "export/tensorrt.py")
OBJECTS = {"builder": "Builder", "parser": "OnnxParser", "config": "IBuilderConfig", "profile": "IOptimizationProfile"}
RESULTS = {"get_error": "ParserError", "get_timing_cache": "ITimingCache"}
DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return getenv("NO_GPU") ? 100 : 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 7; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 12 : attribute == 76 ? 1 : -1;
    return device == 7 ? 0 : 101;
}
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "580.65.06", length); return 0; }
"""


def used_names() -> set[str]:
    """Every TensorRT name in the two files that use it: trt.X.Y, and X.y of what the variables and results there are."""
    names = set()
    trees = [ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in USERS]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id in OBJECTS:
            names.add(f"{OBJECTS[owner.id]}.{node.attr}")
        elif isinstance(owner, ast.Call) and isinstance(owner.func, ast.Attribute) and owner.func.attr in RESULTS:
            names.add(f"{RESULTS[owner.func.attr]}.{node.attr}")
        elif ast.unparse(node).startswith("trt."):
            names.add(ast.unparse(node).removeprefix("trt."))
    return names


def test_the_names_are_collected():
    assert used_names() >= {
        "BuilderFlag.REFIT", "BuilderFlag.VERSION_COMPATIBLE", "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse_from_file", "ParserError.desc", "ITimingCache.serialize", "IBuilderConfig.set_timing_cache",
        "IOptimizationProfile.set_shape", "Builder.build_serialized_network", "ILogger.Severity.ERROR", "__version__",
    }  # fmt: skip


class Bindings:
    """TensorRT's Python package from its wheel, with empty libraries in place of the vendor's: every function is null.

    The wheels hold no type stubs; their compiled extension, once loaded, knows its names and signatures better than a
    search for strings would.
    """

    def __init__(self, folder: Path, major: int) -> None:
        self.folder, self.major = folder, major
        wanted = f"tensorrt_cu13_bindings=={major}.*"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), wanted]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=25)
        except subprocess.TimeoutExpired:
            pytest.skip(f"the package registry did not give {wanted} within 25 s")
        if done.returncode:
            pytest.skip(f"the package registry has no {wanted} for this Python: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        (folder / "tensorrt").mkdir()
        names = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
        (folder / "tensorrt" / "__init__.py").write_text(names)  # as the vendor's own package does
        symbols: set[str] = set()
        for _ in range(40):
            source = "\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in sorted(symbols))
            for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
                self.compile(f"lib{library}.so.{major}", source)
            missing = re.search(r"undefined symbol: (\w+)", self.run("import tensorrt").stderr)
            if not missing:
                break
            symbols.add(missing[1])

    def compile(self, library: str, source: str) -> None:
        command = ["cc", "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", str(self.folder / library)]
        subprocess.run(command, input=source, text=True, check=True)

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess:
        paths = os.pathsep.join([str(self.folder), *filter(None, sys.path)])
        env = os.environ | {"LD_LIBRARY_PATH": str(self.folder), "PYTHONPATH": paths} | environment
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True)


@pytest.fixture(scope="module", params=[10, 11], ids=["TensorRT 10", "TensorRT 11"])
def bindings(request, tmp_path_factory):
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler to load the bindings without their libraries")
    return Bindings(tmp_path_factory.mktemp(f"tensorrt{request.param}"), request.param)


def test_every_name_is_in_the_bindings(bindings):
    done = bindings.run(f"""
        import operator, tensorrt
        for name in {sorted(used_names())}:
            operator.attrgetter(name)(tensorrt)
        print(tensorrt.__version__, hasattr(tensorrt.BuilderFlag, "FP16"))
        print(tensorrt.IBuilderConfig.set_timing_cache.__doc__, tensorrt.Builder.create_network.__doc__)
    """)
    assert done.returncode == 0, done.stderr
    version, weakly_typed = done.stdout.split()[:2]
    assert version.startswith(f"{bindings.major}.") and weakly_typed == str(bindings.major == 10)
    assert "ignore_mismatch: bool) -> bool" in done.stdout and "flags: typing.SupportsInt = 0" in done.stdout


BUILD = """
    import sys
    from imagine_flash.core.errors import ArtifactError
    from imagine_flash.core.tensorrt_plans import this_machine
    from imagine_flash.export.tensorrt import build_plans
    try:
        print(this_machine().model_dump_json())
        build_plans({folder!r}, graphs=["denoiser"], progress=print)
    except ArtifactError as error:
        print(error)
"""


def test_up_to_the_first_answer_of_the_library(bindings, artifact):
    """The real bindings, a driver of a GPU of sm_121, and a TensorRT that cannot start, as on a machine with a broken GPU."""
    code = BUILD.format(folder=str(artifact))
    if shutil.which("nvidia-smi") is None:
        done = bindings.run(code)
        assert re.match("no NVIDIA driver here .*; run 'imagine-flash build-tensorrt FOLDER' on", done.stdout), done
    for library in ("libcuda.so.1", "libnvidia-ml.so.1"):
        bindings.compile(library, DRIVER)
    done = bindings.run(code, NO_GPU="1")
    assert done.stdout.startswith(
        "no usable NVIDIA GPU here (the driver answers [100, 0, 0, 0, 0, 0], 0 is good); run"
    ), done
    done = bindings.run(code)
    assert done.returncode == 0, done.stderr
    machine, building, message = done.stdout.splitlines()
    found = Machine.model_validate_json(machine)
    assert (found.sm, found.driver) == ("sm_121", "580.65.06") and found.tensorrt.startswith(f"{bindings.major}.")
    assert building == f"building {key_of(artifact, found).file}"
    assert message == f"denoiser: TensorRT {found.tensorrt} cannot start on this machine: it does not say why"
    assert sorted(path.name for path in (artifact / "tensorrt").iterdir()) == ["build.json"]


# with TensorRT and a GPU


@pytest.mark.gpu
def test_a_real_plan(artifact):
    trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    import torch

    told: list[str] = []
    (plan,) = build_plans(artifact, graphs=["denoiser"], progress=told.append)
    assert find_plan(artifact, "denoiser") == plan
    assert build_plans(artifact, graphs=["denoiser"], progress=told.append) == [plan]
    assert told == [f"building {plan.name}", f"{plan.name} is there"]
    assert list((artifact / "tensorrt").glob("timing_*.cache"))
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.read_bytes())
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    for batch in (1, 3, 4):
        x = torch.rand(batch, 4, 8, 8, device="cuda")
        y = torch.empty_like(x)
        context.set_input_shape("x", tuple(x.shape))
        context.set_tensor_address("x", x.data_ptr())
        context.set_tensor_address("y", y.data_ptr())
        torch.cuda.synchronize()
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        torch.testing.assert_close(y, x * torch.arange(4.0, device="cuda").reshape(4, 1, 1))


@pytest.mark.gpu
def test_a_graph_that_tensorrt_refuses(artifact):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    (artifact / "denoiser.onnx").write_bytes(model([NODE("Det", ["x"], ["y"])]).SerializeToString())
    rehash(artifact)
    with pytest.raises(ArtifactError, match=r"denoiser: TensorRT .* cannot parse denoiser\.onnx: .*Det"):
        build_plans(artifact, graphs=["denoiser"])
