"""One way to draw, in a process of its own: a script that needs nothing of this project, so that any environment's Python runs it.

    python -P worker.py '{"candidate": "optimum-intel", "student": "...", ...}'

It loads, says so, and then draws what each line of its input asks for. Requests and answers are JSON, one a line; prompts are
new ones, so text encoders run. What libraries print goes to standard error.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Pictures = tuple[Any, dict[str, float]]  # uint8 (N, H, W, 3); seconds of the stages
Draw = Callable[[dict[str, Any]], Pictures]


def engine(told: dict[str, Any]) -> Draw:
    """This project's engine on an artifact."""
    from imagine_flash.engine import Engine, GenerateRequest

    height, width = told["size"]
    options = {"backend": told["backend"], "precision": told["precision"], "sizes": [(height, width)]}
    loaded = Engine.load(told["artifact"], max_batch=told["batch"], **options)
    loaded.warm_up()
    told["about"] = f"{loaded.backend.name} {getattr(loaded.backend, 'precision', loaded.artifact.precision)}"

    def draw(asked: dict[str, Any]) -> Pictures:
        loaded.prompt_cache.clear()
        common = {"steps": asked["steps"], "height": height, "width": width}
        requests = [
            GenerateRequest(prompt=prompt, seed=asked["seed"] + i, **common)
            for i, prompt in enumerate(asked["prompts"])
        ]
        results = [waiting.result() for waiting in [loaded.submit(request) for request in requests]]
        first = results[0].timings
        stages = {"text": first.encode, "network": sum(first.denoise) + sum(first.sampler), "decoder": first.decode}
        return np.concatenate([result.images for result in results]), stages

    return draw


def diffusers(told: dict[str, Any]) -> Draw:
    """diffusers in eager torch; channels_last and torch.compile as its guide to speed has them."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(told["student"], torch_dtype=getattr(torch, told["dtype"]))
    if told["channels_last"]:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if told["compile"]:
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    return _of_pipeline(pipeline, told)


def optimum_onnx(told: dict[str, Any]) -> Draw:
    """optimum-onnx on onnxruntime, as its documentation says."""
    from optimum.onnxruntime import ORTDiffusionPipeline

    return _of_pipeline(ORTDiffusionPipeline.from_pretrained(told["converted"]), told)


def optimum_intel(told: dict[str, Any]) -> Draw:
    """optimum-intel on OpenVINO: as documented, or with static shapes of what is drawn.

    Its own `reshape` doubles the network's batch, for guidance, which few-step students don't use: it is set right again.
    """
    from optimum.intel import OVDiffusionPipeline

    pipeline: Any = OVDiffusionPipeline.from_pretrained(told["converted"], compile=False)
    if told["static"]:
        batch, (height, width) = told["batch"], told["size"]
        pipeline.reshape(1, height, width, batch)
        network = pipeline.unet.model
        rows = {port.get_any_name(): port.get_partial_shape() for port in network.inputs}
        network.reshape({n: [batch, *list(shape)[1:]] if len(shape) > 1 else shape for n, shape in rows.items()})
        text = pipeline.text_encoder.model
        text.reshape({port: [batch, *list(port.get_partial_shape())[1:]] for port in text.inputs})
    pipeline.compile()
    return _of_pipeline(pipeline, told)


def openvino_genai(told: dict[str, Any]) -> Draw:
    """openvino-genai's Text2ImagePipeline: as documented, or with static shapes."""
    import openvino
    import openvino_genai

    height, width = told["size"]

    class Given(openvino_genai.Generator):
        """Gives the noise that all candidates start from."""

        def __init__(self, noise: Any) -> None:
            super().__init__()
            self.values = iter(noise.reshape(-1).tolist())
            self.noise = noise

        def next(self) -> float:
            return next(self.values)

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(np.ascontiguousarray(self.noise.reshape(list(shape))))

    if told["static"]:
        pipeline = openvino_genai.Text2ImagePipeline(told["converted"])
        pipeline.reshape(1, height, width, 1.0)
        pipeline.compile("CPU")
    else:
        pipeline = openvino_genai.Text2ImagePipeline(told["converted"], "CPU")

    def draw(asked: dict[str, Any]) -> Pictures:
        pictures, how = [], {"height": height, "width": width, "guidance_scale": 1.0, "num_images_per_prompt": 1}
        for prompt, noise in zip(asked["prompts"], np.load(asked["noise"]), strict=True):
            steps = asked["steps"]
            found = pipeline.generate(prompt, num_inference_steps=steps, generator=Given(noise[None]), **how)
            pictures.append(np.array(found.data))
        return np.concatenate(pictures), {}

    return draw


def _of_pipeline(pipeline: Any, told: dict[str, Any]) -> Draw:
    """Of diffusers' classes and those that have their signature. guidance: above 1, with the scheduler's own timesteps."""
    import torch

    height, width = told["size"]
    pipeline.set_progress_bar_config(disable=True)
    seconds: dict[str, float] = defaultdict(float)
    network = "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"
    for stage, module in (("text", pipeline.text_encoder), ("network", getattr(pipeline, network))):
        module.forward = _timed(module.forward, seconds, stage)
    pipeline.vae.decode = _timed(pipeline.vae.decode, seconds, "decoder")
    stock = pipeline.scheduler
    built: dict[int, tuple[Any, dict[str, Any]]] = {}  # by steps: whoever draws again and again builds a scheduler once

    @torch.no_grad()
    def draw(asked: dict[str, Any]) -> Pictures:
        seconds.clear()
        noise = torch.from_numpy(np.load(asked["noise"])).to(getattr(torch, told["dtype"]))
        if (guidance := asked.get("guidance", 1.0)) > 1:
            pipeline.scheduler, plan = stock, {"num_inference_steps": asked["guided_steps"]}
        else:
            if asked["steps"] not in built:
                built[asked["steps"]] = _scheduler(stock, asked, told)
            pipeline.scheduler, plan = built[asked["steps"]]
        images = pipeline(
            asked["prompts"],
            **plan,
            height=height,
            width=width,
            guidance_scale=guidance,
            latents=noise,
            output_type="np",
        ).images
        return (images * 255).round().astype(np.uint8), dict(seconds)

    return draw


def _scheduler(stock: Any, asked: dict[str, Any], told: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline's own scheduler where it visits the student's timesteps by its class's rule, else this project's."""
    if not told["noise_correction"] and type(stock).__name__ == "DDIMScheduler":
        stock.set_timesteps(asked["steps"])
        if [int(t) for t in stock.timesteps] == asked["plan"]:
            return stock, {"num_inference_steps": asked["steps"]}
    _find_package(told["package"])
    from imagine_flash.pipelines.scheduler import ImagineFlashScheduler

    corrected = {"noise_correction": told["noise_correction"]}
    return ImagineFlashScheduler.from_config(stock.config, **corrected), {"timesteps": asked["plan"]}


def _find_package(folder: str) -> None:
    """Makes imagine_flash importable where it is not installed."""
    if importlib.util.find_spec("imagine_flash") is None:
        spec = importlib.util.spec_from_file_location(
            "imagine_flash", f"{folder}/__init__.py", submodule_search_locations=[folder]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["imagine_flash"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _timed(call: Callable[..., Any], seconds: dict[str, float], stage: str) -> Callable[..., Any]:
    def timed(*args: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = call(*args, **named)
        seconds[stage] += time.perf_counter() - started
        return found

    return timed


def with_known_names(student: Path, copy: Path) -> Path:
    """Links to a student's files, as every transformers reads them: CLIP weights by their names of before 5.24 ("text_model. ..."),
    without which older ones load random weights with a warning, and the vocabulary in files of its own."""
    from safetensors.numpy import load_file, save_file

    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(student.resolve(), copy, copy_function=os.symlink)
    for file in copy.glob("text_encoder*/model.safetensors"):
        tensors = load_file(file)
        if "encoder.layers.0.layer_norm1.weight" in tensors:
            parts = ("embeddings.", "encoder.", "final_layer_norm.")
            renamed = {f"text_model.{n}" if n.startswith(parts) else n: values for n, values in tensors.items()}
            file.unlink()
            save_file(renamed, file, metadata={"format": "pt"})
    for file in copy.glob("tokenizer*/tokenizer.json"):
        known = json.loads(file.read_text(encoding="utf-8"))
        if not (file.parent / "vocab.json").exists() and known["model"]["type"] == "BPE":
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in known["model"]["merges"]]
            (file.parent / "vocab.json").write_text(json.dumps(known["model"]["vocab"]), encoding="utf-8")
            (file.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return copy


def convert(told: dict[str, Any]) -> None:
    """`optimum-cli export onnx|openvino` as documented, with float16 weights as this project's artifacts have them.

    Its exporter asks an AutoencoderTiny for the block types of a KL autoencoder and for a distribution, which it has not: its
    latents stand in for it.
    """
    from types import SimpleNamespace

    from diffusers import AutoencoderTiny
    from optimum.commands.optimum_cli import main

    changed: Any = AutoencoderTiny
    build, encode, decode = changed.__init__, changed.encode, changed.decode

    @functools.wraps(build)
    def with_block_types(self: Any, *args: Any, **named: Any) -> None:
        build(self, *args, **named)
        blocks = len(self.config["num_encoder_blocks"]) * [""]
        self.register_to_config(down_block_types=blocks, up_block_types=blocks)

    def as_distribution(self: Any, x: Any, **_: Any) -> Any:
        return {"latent_dist": SimpleNamespace(parameters=encode(self, x).latents)}

    changed.__init__, changed.encode, changed.decode = (
        with_block_types,
        as_distribution,
        lambda self, z: decode(self, z),
    )
    precision = ["--weight-format", "fp16"] if told["format"] == "openvino" else ["--dtype", "fp32"]
    student = with_known_names(Path(told["student"]), Path(f"{told['converted']}-student"))
    what = ["--model", str(student), "--task", "text-to-image", "--library", "diffusers"]
    sys.argv = ["optimum-cli", "export", told["format"], *what, *precision, told["converted"]]
    main()


def memory() -> dict[str, float]:
    """The most that was resident so far, what is now, and of that without pages of files that the system may drop, in GiB;
    nothing where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    known = {"peak": "VmHWM", "resident": "VmRSS", "own": "RssAnon"}
    return {name: int(lines[key].split()[0]) / 2**20 for name, key in known.items() if key in lines}


CANDIDATES: dict[str, Callable[[dict[str, Any]], Draw]] = {
    "engine": engine,
    "diffusers": diffusers,
    "optimum-onnx": optimum_onnx,
    "optimum-intel": optimum_intel,
    "openvino-genai": openvino_genai,
}


def main() -> None:
    """Answers on the standard output that it was started with; everything else that prints there goes to standard error."""
    told = json.loads(sys.argv[1])
    if told["candidate"] == "convert":
        return convert(told)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        draw = CANDIDATES[told["candidate"]](told)
        answer(about=told.get("about", ""), **memory())
        for line in sys.stdin:
            asked = json.loads(line)
            started = time.perf_counter()
            pictures, stages = draw(asked)
            seconds = time.perf_counter() - started
            if "output" in asked:
                np.save(asked["output"], pictures)
            answer(seconds=seconds, stages=stages, **memory())
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:240])
        sys.exit(1)


if __name__ == "__main__":
    main()
