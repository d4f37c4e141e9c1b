"""LoRAs that are swapped while the networks stay: W = W0 + sum of w_i B_i A_i, written into the same storage.

The networks themselves stay as they are, module by module and tensor by tensor, so that what was compiled or captured over them
stays valid and a step costs what it costs without any LoRA. A change of the set costs one pass over the layers that it touches;
these are kept a second time, as they were, so that taking a LoRA away leaves no trace, to the bit.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ArtifactError
from .architectures import architecture_of
from .lora import ADAPTER, Lora, place, take_out
from .skeleton import read_networks

TEXT_ENCODER, DENOISER = "text_encoder", "denoiser"
_FUSE = "imagine-flash export --lora"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA. layers: peft's, by the path of the layer that each changes; stages: which of the networks they are in."""

    layers: Mapping[str, Any]
    stages: frozenset[str]

    def of(self, paths: Container[str]) -> Adapter:
        """Of these layers alone."""
        return Adapter({path: layer for path, layer in self.layers.items() if path in paths}, self.stages)

    def delta(self, path: str) -> torch.Tensor:
        """B A of a layer, scaled by alpha / rank: as its weight."""
        return self.layers[path].get_delta_weight(ADAPTER)


def read_adapters(pipeline: Any, network: str, files: Mapping[str, str]) -> dict[str, Adapter]:
    """The LoRAs of these files, folders or hub ids by name, for a pipeline whose weights stay as they are.

    network: the denoiser's component. Raises ArtifactError for what does not fit, changes no weight or is more than B A,
    MissingExtraError.
    """
    found = {}
    for name, file in files.items():
        layers = place(pipeline, network, Lora(str(file)))
        take_out(pipeline)
        _check_layers(file, layers)
        components = {path.partition(".")[0] for path in layers}
        if others := sorted(part for part in components if part != network and not part.startswith(TEXT_ENCODER)):
            raise ArtifactError(f"the LoRA {file} changes the {others[0]}, which is not swapped; fuse it: {_FUSE}")
        stages = frozenset(DENOISER if part == network else TEXT_ENCODER for part in components)
        found[name] = Adapter(layers, stages)
    return found


def lora_layers(folder: Path, files: Mapping[str, str]) -> tuple[Mapping[str, Adapter], Mapping[str, str]]:
    """LoRAs for an artifact, whose weights are elsewhere: by name; and by component the path of its layers in its stage.

    Raises ArtifactError, MissingExtraError."""
    pipeline, paths = read_networks(folder)
    return read_adapters(pipeline, architecture_of(type(pipeline).__name__).network, files), paths


def _check_layers(file: str, layers: Mapping[str, Any]) -> None:
    for path, layer in layers.items():
        if ADAPTER in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(ADAPTER):
            raise ArtifactError(f"the LoRA {file} is more than two factors in {path}, as DoRA is; fuse it: {_FUSE}")
        if not hasattr(layer, "get_delta_weight"):
            raise ArtifactError(f"the LoRA {file} changes the {type(layer).__name__} {path}; fuse it: {_FUSE}")
    if not any(all(values.any() for values in _factors(layer)) for layer in layers.values()):
        raise ArtifactError(f"the LoRA {file} changes no weight: its own are zero")


def _factors(layer: Any) -> list[torch.Tensor]:
    return [values for name, values in layer.named_parameters() if f".{ADAPTER}" in name]


class Rewriter:
    """The weights that some LoRAs change, in the networks' own storage. Made once the networks are where they stay.

    written: the LoRAs that are in them now, with their weights; None where a write has failed.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = adapters
        self.written: Mapping[str, float] | None = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._originals: dict[str, torch.Tensor] = {}
        self._changed: set[str] = set()  # the paths that may hold something else than their original
        for adapter in adapters.values():
            for path, layer in adapter.layers.items():
                weight = self._weights.setdefault(path, layer.get_base_layer().weight)
                for factor in _factors(layer):
                    factor.data = factor.data.to(weight.device, torch.float32)
        with torch.inference_mode():
            self._originals = {path: weight.detach().clone() for path, weight in self._weights.items()}

    @property
    def bytes(self) -> int:
        """What the originals take."""
        return sum(values.nbytes for values in self._originals.values())

    @torch.inference_mode()
    def write(self, chosen: Mapping[str, float]) -> None:
        """Has the networks compute with these LoRAs, and no others; computed in float32, rounded once. Always in the order of
        names, so that the same set gives the same bits."""
        self.written = None
        named = [(self.adapters[name], weight) for name, weight in sorted(chosen.items())]
        for path, original in self._originals.items():
            parts = [(weight, adapter.delta(path)) for adapter, weight in named if path in adapter.layers]
            if not parts and path not in self._changed:
                continue
            self._changed.add(path)
            if parts:
                values = original.to(torch.float32, copy=True)
                for weight, delta in parts:
                    values.add_(delta, alpha=weight)
                self._weights[path].copy_(values)
            else:
                self._weights[path].copy_(original)
                self._changed.discard(path)
        self.written = dict(chosen)
