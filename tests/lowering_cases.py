"""Torch modules with their graphs, real ones and spelt out: what the tests of half precision lower and run.

A module, not fixtures, so that each test file takes what it uses: `from imagine_flash.tests.lowering_cases import export`.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from imagine_flash.export.onnx import StageGraph, _export, save_graph
from imagine_flash.export.precision import emulate, find_islands, lower, run_graph
from imagine_flash.export.weights import WEIGHTS_FILE, WeightStore
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.tests import pipelines

OPSETS = (20, 23)  # decomposed attention and GroupNorm; native ones
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Case:
    """One torch module, its graph, and an input to run both on."""

    module: torch.nn.Module
    stage: StageGraph
    store: WeightStore
    feed: dict[str, np.ndarray]

    def run(self, stage: StageGraph) -> np.ndarray:
        return next(iter(run_graph(stage, self.store, [self.feed])[0].values()))

    def islands(self, precision: str, limit: float = float("inf")) -> dict[str, str]:
        return find_islands(self.stage, self.store, precision, [self.feed], limit=limit).modules

    def lower(self, precision: str, islands=()) -> StageGraph:
        return lower(self.stage, self.store, precision, islands)

    def emulated(self, precision: str, islands=()) -> np.ndarray:
        return self.run(emulate(self.lower(precision, islands)))


def real_cases(make_folder: Callable[[str], Path]) -> Callable[[str, int], Case]:
    """(stage, opset) -> Case: the tiny real networks, each exported once."""

    @cache
    def parts(vae: str):
        stages = stages_of(pipelines.build_pipeline(vae=vae))
        ids = stages.encode_prompts(pipelines.CAPTIONS[:3])["input_ids"]
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            embeddings = stages.text_encoder(ids)[0]
        denoised = {"latents": latents, "timestep": torch.tensor([999.0, 666.0, 1.0]), "embeddings": embeddings}
        return {
            "text_encoder": (stages.text_encoder, {"input_ids": ids}, ("embeddings",)),
            "denoiser": (stages.denoiser(stages.default_size), denoised, ("m",)),
            "decoder": (stages.decoder, {"latents": latents}, ("images",)),
        }

    @cache
    def build(name: str, opset: int) -> Case:
        vae, part = ("tiny", "decoder") if name == "tiny_decoder" else ("kl", name)
        module, inputs, outputs = parts(vae)[part]
        return export(make_folder(name), module, inputs, outputs, opset)

    return build


def export(folder: Path, module, inputs: dict[str, torch.Tensor], outputs=("y",), opset: int = 23) -> Case:
    store = WeightStore(folder / WEIGHTS_FILE)
    with torch.inference_mode():
        stage = _export(module.eval(), inputs, dict.fromkeys(outputs, ()), store, opset)
    return Case(module, stage, store, {name: tensor.numpy() for name, tensor in inputs.items()})


def graph(folder: Path, nodes, constants: dict[str, Any], x: np.ndarray, opset: int = 23) -> Case:
    """A graph spelt out: "x" -> "y", float32."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *x.shape[1:]]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    proto = helper.make_graph(nodes, "case", ends[:1], ends[1:], tensors)
    return Case(torch.nn.Identity(), StageGraph(proto, {}, opset), WeightStore(folder / WEIGHTS_FILE), {"x": x})


def modules_of(stage: StageGraph) -> set[str]:
    return {node.name for node in stage.graph.node}


def inferred(stage: StageGraph, store: WeightStore) -> dict[str, int]:
    """The types of all values; raises where they contradict one another."""
    path = store.path.parent / "strict.onnx"
    save_graph(stage, path)
    onnx.checker.check_model(str(path))
    model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    path.unlink()
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in model.graph.initializer
    }


def error(got: np.ndarray, want: np.ndarray) -> float:
    """RMS of the difference, relative to the RMS of the values; of images, in 0..1."""
    difference = np.sqrt(np.mean((got.astype(np.float64) - want.astype(np.float64)) ** 2))
    return float(difference / (255.0 if want.dtype == np.uint8 else np.sqrt(np.mean(want.astype(np.float64) ** 2))))


@torch.inference_mode()
def torch_output(module: torch.nn.Module, feed: dict[str, np.ndarray], dtype: torch.dtype) -> np.ndarray:
    inputs = [torch.from_numpy(array) for array in feed.values()]
    output = copy.deepcopy(module).to(dtype)(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    output = output[0] if isinstance(output, tuple) else output
    return (output.float() if output.is_floating_point() else output).numpy()
