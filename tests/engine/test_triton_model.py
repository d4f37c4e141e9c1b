"""The Triton model that takes prompts: its pictures are the engine's. The server is a stand-in that runs the repository's own
model files; at the end, where there is one, Triton's own."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.triton_model import TritonPythonModel
from imagine_flash.export.triton_repository import write_triton_repository
from imagine_flash.tests.artifacts import with_format


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values

    def as_numpy(self) -> np.ndarray:
        return self.values


class Served:
    """Triton as far as a model sees it: requests of others by name, each at least (B, 1)."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.calls = repository, list[tuple[str, int]]()
        self.broken = ""

    def ask(self, model: str, names: list[str], inputs: list[Tensor]) -> Any:
        if model == self.broken:
            return SimpleNamespace(
                has_error=lambda: True, error=lambda: SimpleNamespace(message=lambda: "out of memory")
            )
        assert all(tensor.values.ndim >= 2 and tensor.values.flags.c_contiguous for tensor in inputs)
        session = onnxruntime.InferenceSession(self.repository / model / "1" / "model.onnx")
        shapes = {value.name: value.shape for value in session.get_inputs()}
        fed = {t.name: t.values[:, 0] if len(shapes[t.name]) == 1 else t.values for t in inputs}
        self.calls.append((model, len(inputs[0].values)))
        arrays: Any = session.run(names, fed)
        found = [values[:, None] if values.ndim == 1 else values for values in arrays]
        tensors = [Tensor(name, values) for name, values in zip(names, found, strict=True)]
        return SimpleNamespace(has_error=lambda: False, tensors=tensors)

    def utils(self) -> ModuleType:
        module: Any = ModuleType("triton_python_backend_utils")
        module.Tensor, module.TRITONSERVER_MEMORY_CPU = Tensor, 0
        module.PreferredMemory = lambda kind, device: (kind, device)
        module.get_input_tensor_by_name = lambda request, name: request.get(name)
        module.get_output_tensor_by_name = lambda answer, name: next(t for t in answer.tensors if t.name == name)
        module.InferenceRequest = lambda *, model_name, requested_output_names, inputs, preferred_memory: (
            SimpleNamespace(exec=lambda: self.ask(model_name, requested_output_names, inputs))
        )
        module.InferenceResponse = lambda tensors=(), error=None: SimpleNamespace(tensors=tensors, error=error)
        module.TritonError = lambda message, code: (code, message)
        module.TritonError.INTERNAL, module.TritonError.INVALID_ARG = "INTERNAL", "INVALID_ARG"
        return module


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("served") / "artifact")
    with_format(folder, "triton-repository", write_triton_repository)
    return folder


@pytest.fixture
def served(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    served = Served(artifact / "triton_repository")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", served.utils())
    return served


@pytest.fixture
def model(artifact: Path, served: Served):
    model = TritonPythonModel()
    model.initialize({"model_repository": str(artifact / "triton_repository" / "text_to_image")})
    yield model
    model.finalize()


@pytest.fixture(scope="module")
def drawn(artifact: Path):
    with Engine.load(artifact, backend="onnxruntime", device="cpu") as engine:
        yield lambda **values: engine.generate(GenerateRequest(**values)).images[0]


def request(*prompts: str | bytes, **columns: list[Any]) -> dict[str, Tensor]:
    """As Triton hands it over: texts are bytes, every input is (B, 1)."""
    texts = {"PROMPT": list(prompts)} | {name: values for name, values in columns.items() if "PROMPT" in name}
    kinds = {"SEED": np.int64, "GUIDANCE": np.float32}
    found = {}
    for name, values in (columns | texts).items():
        if name in texts:
            values = [text.encode() if isinstance(text, str) else text for text in values]
        found[name] = Tensor(name, np.array(values, object if name in texts else kinds.get(name, np.int32))[:, None])
    return found


def pictures(answer: Any) -> np.ndarray:
    assert answer.error is None, answer.error
    return answer.tensors[0].as_numpy()


def test_its_pictures_are_the_engines(model: TritonPythonModel, drawn: Callable[..., np.ndarray]) -> None:
    asked = [request("a cat", "a fox", SEED=[7, 9], STEPS=[steps, steps]) for steps in (1, 2, 3)]
    for steps, answer in zip((1, 2, 3), model.execute(asked), strict=True):
        expected = [drawn(prompt=text, seed=seed, steps=steps) for text, seed in (("a cat", 7), ("a fox", 9))]
        assert pictures(answer).dtype == np.uint8
        assert np.abs(pictures(answer).astype(int) - np.stack(expected)).max() <= 1
        assert answer.tensors[1].as_numpy().tolist() == [[7], [9]]


def test_requests_that_come_together_share_calls(model: TritonPythonModel, served: Served) -> None:
    model.execute([request("a cat", SEED=[i], STEPS=[2]) for i in range(3)])
    assert {name for name, _ in served.calls} == {"text_encoder", "denoiser", "decoder"}, "one copy of the weights"
    assert max(rows for name, rows in served.calls if name == "denoiser") > 1


def test_what_may_be_left_out(model: TritonPythonModel, drawn: Callable[..., np.ndarray]) -> None:
    (answer,) = model.execute([request("a cat")])
    (seed,) = answer.tensors[1].as_numpy()[0].tolist()
    assert np.abs(pictures(answer)[0].astype(int) - drawn(prompt="a cat", seed=seed)).max() <= 1
    guided = request("a cat", SEED=[3], GUIDANCE=[2.0], NEGATIVE_PROMPT=["a dog"])
    expected = drawn(prompt="a cat", seed=3, guidance=2.0, negative_prompt="a dog")
    assert np.abs(pictures(model.execute([guided])[0])[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (request("a cat", STEPS=[9]), "steps must be 1, 2 or 3, got 9"),
        (request("a cat", HEIGHT=[77]), "this engine draws 64x64 (width x height), got 64x77"),
        (request("a cat", SEED=[-1]), "seed must be a whole number from 0"),
        (request(b"\xff\xfe"), r"texts must be UTF-8, got b'\xff\xfe'"),
        (request("a cat", "a fox", STEPS=[1, 9]), "steps must be 1, 2 or 3, got 9"),
    ],
)
def test_bad_input_is_one_line_and_harms_no_other(model: TritonPythonModel, asked: dict, says: str) -> None:
    wrong, right = model.execute([asked, request("a cat")])
    code, message = wrong.error
    assert code == "INVALID_ARG" and says in message and "\n" not in message
    assert pictures(right).shape == (1, 64, 64, 3)


def test_a_broken_network_is_the_servers_fault(model: TritonPythonModel, served: Served) -> None:
    served.broken = "denoiser"
    (answer,) = model.execute([request("a cat")])
    assert answer.error[0] == "INTERNAL" and "out of memory" in answer.error[1]
    served.broken = ""
    assert pictures(model.execute([request("a cat")])[0]).shape == (1, 64, 64, 3)


# on Triton's own server, as nvidia-pytriton has it: with its python backend, and none for ONNX

ONNX_BACKEND = """
import os

import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]

    def execute(self, requests):
        fed = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        given = [zip(self.names, self.session.run(self.names, inputs)) for inputs in fed]
        return [utils.InferenceResponse([utils.Tensor(*pair) for pair in outputs]) for outputs in given]
"""


@pytest.fixture(scope="module")
def address(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's, with the repository loaded and warm."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        pytest.skip("needs nvidia-pytriton, whose wheel holds a Triton server")
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("nvidia-pytriton 0.7 has Triton 2.51, whose python backend reads no arrays of NumPy 2")
    home, folder = Path(spec.origin).parent / "tritonserver", tmp_path_factory.mktemp("triton")
    shutil.copytree(home / "backends", folder / "backends")
    (folder / "backends" / "onnxruntime").mkdir()
    (folder / "backends" / "onnxruntime" / "model.py").write_text(ONNX_BACKEND)
    stub = f"{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
    for source, place in ((home / "python_backend_stubs" / stub, "backends/python"), (home / "bin/tritonserver", ".")):
        Path(shutil.copy(source, folder / place)).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [folder / "tritonserver", "--model-repository", artifact / "triton_repository", "--http-port", str(port)]
    command += ["--backend-directory", folder / "backends", "--http-address", "127.0.0.1"]
    command += ["--allow-grpc", "false", "--allow-metrics", "false", "--exit-timeout-secs", "2"]
    paths = {
        "LD_LIBRARY_PATH": str(home.parents[1] / "nvidia_pytriton.libs"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(list(map(str, command)), env=os.environ | paths, stdout=log, stderr=log)
    try:
        for _ in range(240):
            time.sleep(0.5)
            assert server.poll() is None, (folder / "log").read_text(errors="replace")[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_on_tritons_own_server(address: str, drawn: Callable[..., np.ndarray], steps: int) -> None:
    columns = {"PROMPT": ("BYTES", ["a cat", "a fox"]), "SEED": ("INT64", [7, 9]), "STEPS": ("INT32", [steps, steps])}
    inputs = [{"name": name, "shape": [2, 1], "datatype": kind, "data": data} for name, (kind, data) in columns.items()]
    body = json.dumps({"inputs": inputs}).encode()
    with urllib.request.urlopen(f"{address}/v2/models/text_to_image/infer", body, timeout=60) as answer:
        outputs = {tensor["name"]: tensor for tensor in json.load(answer)["outputs"]}
    got = np.array(outputs["IMAGES"]["data"]).reshape(outputs["IMAGES"]["shape"])
    expected = [drawn(prompt=text, seed=seed, steps=steps) for text, seed in (("a cat", 7), ("a fox", 9))]
    assert np.abs(got - np.stack(expected)).max() <= 1 and outputs["SEED"]["data"] == [7, 9]
