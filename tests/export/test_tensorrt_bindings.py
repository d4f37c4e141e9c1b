"""TensorRT's real bindings, of both major versions, above libraries that answer nothing; and whole plans where a GPU is."""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.export.tensorrt import build_plans, write_tensorrt
from imagine_flash.folders.files import hash_files
from imagine_flash.folders.manifests import TensorSpec
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.folders.tensorrt_plans import Machine, find_plan
from imagine_flash.tests.tensorrt_artifact import NODE, build_artifact, key_of, model, rehash

ROOT = Path(__file__).parents[2]
USERS = ("folders/tensorrt_plans.py", "export/tensorrt.py", "engine/backends/tensorrt.py")
OBJECTS = {
    "builder": "Builder",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
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


@pytest.fixture
def artifact(tmp_path):
    return build_artifact(tmp_path / "artifact")


def used_names() -> set[str]:
    """Every TensorRT name in the files that use it: trt.X.Y, and X.y of what the variables and results there are."""
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
        "BuilderFlag.REFIT",
        "BuilderFlag.VERSION_COMPATIBLE",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse",
        "ParserError.desc",
        "ITimingCache.serialize",
        "IBuilderConfig.set_timing_cache",
        "IOptimizationProfile.set_shape",
        "Builder.build_serialized_network",
        "ILogger.Severity.ERROR",
        "__version__",
        "Runtime.deserialize_cuda_engine",
        "Runtime.engine_host_code_allowed",
        "ICudaEngine.create_execution_context",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_optimization_profile_async",
        "IExecutionContext.update_device_memory_size_for_shapes",
        "IExecutionContext.set_device_memory",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "DataType.INT64",
    }


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
        print(tensorrt.OnnxParser.parse.__doc__, tensorrt.ICudaEngine.create_execution_context.__doc__)
        for name in {sorted(name for name in used_names() if name.startswith("IExecutionContext."))}:
            print(operator.attrgetter(name)(tensorrt).__doc__)
    """)
    assert done.returncode == 0, done.stderr
    version, weakly_typed = done.stdout.split()[:2]
    assert version.startswith(f"{bindings.major}.") and weakly_typed == str(bindings.major == 10)
    for signature in (
        "ignore_mismatch: bool) -> bool",
        "flags: typing.SupportsInt = 0",
        "name: str, shape: tuple) -> bool",
        "name: str, memory: typing.SupportsInt) -> bool",
        "stream_handle: typing.SupportsInt) -> bool",
        "name: str) -> tensorrt_bindings.tensorrt.Dims",
        "model: typing_extensions.Buffer, path: str = None) -> bool",
        "strategy: tensorrt_bindings.tensorrt.ExecutionContextAllocationStrategy = ",
        "profile_index: typing.SupportsInt, stream_handle: typing.SupportsInt) -> bool",
        "update_device_memory_size_for_shapes(self: tensorrt_bindings.tensorrt.IExecutionContext) -> int",
        "memory: typing.SupportsInt, size: typing.SupportsInt) -> None",
    ):
        assert signature in done.stdout


BUILD = """
    import sys
    from imagine_flash.core.errors import ArtifactError
    from imagine_flash.folders.tensorrt_plans import this_machine
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
    bindings.compile("libcuda.so.1", DRIVER)
    if shutil.which("nvidia-smi") is None:
        assert '"driver":""' in bindings.run(code).stdout, "its version is for the record only"
    bindings.compile("libnvidia-ml.so.1", DRIVER)
    done = bindings.run(code, NO_GPU="1")
    assert done.stdout.startswith("no usable NVIDIA GPU here (the driver answers [100, 0, 0, 0], 0 is good); run"), done
    done = bindings.run(code)
    assert done.returncode == 0, done.stderr
    machine, building, message = done.stdout.splitlines()
    found = Machine.model_validate_json(machine)
    assert (found.sm, found.driver) == ("sm_121", "580.65.06") and found.tensorrt.startswith(f"{bindings.major}.")
    assert building == f"building {key_of(artifact, found).file}"
    assert message == f"denoiser: TensorRT {found.tensorrt} cannot start on this machine: it does not say why"
    assert sorted(path.name for path in (artifact / "tensorrt").iterdir()) == ["build.json"]


LOAD = """
    from pathlib import Path
    from imagine_flash.folders.reading import read_artifact_manifest
    from imagine_flash.core.errors import ArtifactError
    from imagine_flash.engine.backends.choosing import load_backend
    folder = Path({folder!r})
    try:
        load_backend("tensorrt", folder, read_artifact_manifest(folder))
    except ArtifactError as error:
        print(error)
"""


def test_the_engine_up_to_the_first_answer_of_the_library(bindings, artifact):
    for library in ("libcuda.so.1", "libnvidia-ml.so.1"):
        bindings.compile(library, DRIVER)
    done = bindings.run(LOAD.format(folder=str(artifact)))
    assert done.returncode == 0, done.stderr
    cannot_start = r"TensorRT [\d.]+ cannot start on this machine \(it does not say why\); see what nvidia-smi says\n"
    assert re.fullmatch(cannot_start, done.stdout), done


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
    stream = torch.cuda.Stream()
    for batch in (1, 3, 4):
        context = engine.create_execution_context()
        assert context.set_optimization_profile_async(int(batch > 1), stream.cuda_stream)
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
@pytest.mark.parametrize("width", [64, 512], ids=["heads of a UNet", "the head of a decoder"])
def test_an_attention_that_no_fused_kernel_takes(artifact, width):
    """In float32, which no fused kernel has: without the attribute of the copy the build fails."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    attention = model([NODE("Attention", ["x", "x", "x"], ["y"])], shape=("batch", 1, 64, width))
    (artifact / "denoiser.onnx").write_bytes(attention.SerializeToString())
    manifest = read_artifact_manifest(artifact, verify=False)
    x = TensorSpec(name="x", dtype="float32", shape=["batch", 1, 64, width])
    denoiser = manifest.graphs["denoiser"].model_copy(update={"inputs": [x]})
    manifest = manifest.model_copy(update={"graphs": manifest.graphs | {"denoiser": denoiser}})
    write_tensorrt(artifact, manifest)
    write_manifest(artifact, manifest.model_copy(update={"files": hash_files(artifact)}))
    assert build_plans(artifact, graphs=["denoiser"])


@pytest.mark.gpu
def test_a_graph_that_tensorrt_refuses(artifact):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    (artifact / "denoiser.onnx").write_bytes(model([NODE("Det", ["x"], ["y"])]).SerializeToString())
    rehash(artifact)
    with pytest.raises(ArtifactError, match=r"denoiser: TensorRT .* cannot parse denoiser\.onnx: .*Det"):
        build_plans(artifact, graphs=["denoiser"])
