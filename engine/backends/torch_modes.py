"""How torch runs a network: as it is, compiled for one batch size, or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .graphs import Run

WARM_UP = 3  # calls before a capture, for what libraries allocate and choose at their first ones
Network = Callable[..., Any]  # tensors -> one, or a tuple


class InPrecision(torch.nn.Module):
    """A denoiser that takes latents in float32 and computes in `dtype`, that of the conditions."""

    def __init__(self, denoiser: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.dtype = denoiser, dtype

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x.to(self.dtype), timestep, *conditions)


class OnGpu(torch.nn.Module):
    """A decoder whose pixels are written by the kernel, from the vae's own dtype."""

    def __init__(self, decoder: Any) -> None:
        from ...kernels.to_image import to_image

        super().__init__()
        self.decoder, self.to_image = decoder, to_image

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = self.decoder.decode(latents)
        return self.to_image(decoded), self.decoder.all_finite(latents, decoded)


class Captured:
    """A network for one batch size as a CUDA graph over static arrays; its output is valid until the next call."""

    def __init__(self, network: Network, inputs: Sequence[torch.Tensor], pool: Any) -> None:
        self.inputs, side = inputs, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                network(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = network(*inputs)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        for static, values in zip(self.inputs, inputs, strict=True):
            static.copy_(values, non_blocking=True)
        self._graph.replay()
        return _as_list(self.output)


def compiled(network: Network, inputs: Sequence[torch.Tensor]) -> Network:
    """The network compiled for tensors like these, made under inference mode."""
    fast = torch.compile(network, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1024):  # every batch size of every size is one
        fast(*inputs)
    # what the batcher computes by itself is not of that kind, and would be compiled for anew
    return lambda *given: fast(*(values if values.is_inference() else values.clone() for values in given))


def as_run(network: Network) -> Run:
    """The network as a graph: a list in, a list out."""

    def run(inputs: Sequence[Any]) -> list[Any]:
        return _as_list(network(*inputs))

    return run


def _as_list(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
