"""Matrix products of a denoiser in 8 bits, by torchao: weights once, activations token by token as they come.

int8 on any device, float8 on GPUs that multiply it. Judged at load by pictures: what draws something else is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from ...core.errors import ArtifactError, missing_extra
from ...core.images import psnr
from ...folders.manifests import ModelDescription, Size
from ..reference import reference_generate
from ..request import GenerateRequest
from ..tokenizer import PromptTokenizer
from .base import Backend, BackendOptions

SCHEMES = ("int8", "fp8")
FP8_CAPABILITY = (8, 9)  # of NVIDIA's: Ada, Hopper and later
LEAST_PSNR = 20.0  # dB of the worst picture, as of an export in int8
PROMPTS = ("a red fox", "a house by the sea at night", "a cat on a pink sofa")
MULTIPLE, TOKENS = 16, 17  # what the kernels take: sides of a matrix, and the fewest tokens
SMALL = 2**16  # weights below which a matrix stays as it is: a guess
Run = Callable[[Sequence[Any]], list[Any]]
Layer = torch.nn.Linear | torch.nn.Conv2d


class Quantisable(Backend, Protocol):
    """A backend whose network is asked directly."""

    def open(self, graph: str, batch: int) -> Run: ...
    def example(self, graph: str, batch: int) -> list[torch.Tensor]: ...


def computes_in(options: BackendOptions, device: torch.device) -> tuple[str, str | None]:
    """The precision that networks compute in, and the 8 bits of the denoiser's matrices, if any.

    Raises ArtifactError, MissingExtraError for what cannot be in 8 bits here."""
    asked, automatic = options.precision, {"cpu": "fp32", "cuda": "bf16"}[device.type]
    if asked not in SCHEMES:
        return automatic if asked == "auto" else asked, None
    if options.loras:
        raise ArtifactError(f"torch swaps no LoRAs in {asked}; take fp32 or bf16")
    if asked == "fp8":
        has = tuple(torch.cuda.get_device_capability(device)) if device.type == "cuda" else ()
        if has < FP8_CAPABILITY:
            needs, here = ".".join(map(str, FP8_CAPABILITY)), f"has {has[0]}.{has[1]}" if has else "is none"
            raise ArtifactError(
                f"fp8 needs a GPU of compute capability {needs} or later, and {device} {here}; take int8"
            )
    if find_spec("torchao") is None:
        raise missing_extra("torchao", "torchao")
    return automatic, asked


def quantise(
    backend: Quantisable, tokenizer: PromptTokenizer, model: ModelDescription, network: torch.nn.Module, scheme: str
) -> int:
    """Puts matrices of the denoiser `network`, which `backend` draws with module by module, in 8 bits. Returns how many.

    Raises ArtifactError where a picture then has less than 20 dB to what was drawn before, or where none is worth it.
    """
    size: Size = model.sizes[0]
    graph = model.graph_name("denoiser", size)
    before = _pictures(backend, tokenizer, model)
    with torch.inference_mode():
        chosen = _worth_it(network, backend.open(graph, 0), backend.example(graph, 1))
    if not chosen:
        raise ArtifactError(f"{model.name} has no matrix large enough for {scheme}; take bf16 or fp32")
    _put_in(scheme, network, chosen)
    worst = min(map(psnr, _pictures(backend, tokenizer, model), before))
    if not worst >= LEAST_PSNR:
        raise ArtifactError(
            f"{model.name} in {scheme} draws a picture {worst:.1f} dB from its own, and the least is {LEAST_PSNR:g}; take bf16 "
            "or fp32"
        )
    return len(chosen)


def _pictures(backend: Backend, tokenizer: PromptTokenizer, model: ModelDescription) -> list[Any]:
    """Of the shortest and the longest plan."""
    asked = [
        GenerateRequest(prompt=prompt, steps=steps, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
        for steps in {min(model.plans), max(model.plans)}
    ]
    return [reference_generate(backend, tokenizer, model, request)[0] for request in asked]


def _put_in(scheme: str, network: torch.nn.Module, chosen: set[torch.nn.Module]) -> None:
    torchao: Any = importlib.import_module("torchao.quantization")
    if scheme == "int8":
        config = torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)  # which is the process's
    else:
        rows = torchao.PerRow()
        config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=rows, set_inductor_config=False)
    torchao.quantize_(network, config, filter_fn=lambda part, _: part in chosen)


def _worth_it(network: torch.nn.Module, run: Run, inputs: Sequence[torch.Tensor]) -> set[torch.nn.Module]:
    """The matrices that the kernels take and that latents pass, but for the first and the last layer that they pass: the
    embedding of the timestep and what is read of the text are a small part of the work, and harm the picture most."""
    calls = [_calls(network, lambda x=x: run([x, *inputs[1:]])) for x in (inputs[0], torch.randn_like(inputs[0]))]
    passed = [part for part, (seen, _) in calls[0].items() if not torch.equal(seen, calls[1][part][0])]
    return {
        part
        for part in passed[1:-1]
        if isinstance(part, torch.nn.Linear)
        and part.in_features % MULTIPLE == part.out_features % MULTIPLE == 0
        and part.weight.numel() >= SMALL
        and calls[0][part][1] >= TOKENS
    }


def _calls(network: torch.nn.Module, run: Callable[[], Any]) -> dict[Layer, tuple[torch.Tensor, int]]:
    """By layer, in the order of their calls, the sum of what each read and the number of tokens."""
    found: dict[Layer, tuple[torch.Tensor, int]] = {}

    def see(part: Any, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0]
        found.setdefault(part, (x.sum(dtype=torch.float64), x.numel() // x.shape[-1]))

    hooks = [part.register_forward_pre_hook(see) for part in network.modules() if isinstance(part, Layer)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found
