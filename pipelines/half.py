"""Networks whose weights stay in memory as they are stored, in half precision, and which compute in float32.

Half a number is exactly a float32 number, so nothing is lost; a layer's weight is widened when it is used and dropped again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..models.files import pieces_of

HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
LARGE = 4096  # numbers; smaller weights are widened once and for all

LOOKED_AT = ("wo",)  # T5 casts its state to the type of this weight


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """What all float tensors of a component's safetensors files are stored in: float16, bfloat16, or else float32.

    variant: whose files are read, such as "fp16"; those of others stand beside them. Without, those that the index lists,
    whatever they are called.
    """
    if variant is not None:
        return dtype_of(folder.glob(f"*.{variant}*.safetensors"))
    listed = [path for index in folder.glob("*.safetensors.index.json") for path in pieces_of(index)]
    return dtype_of(listed or (path for path in folder.glob("*.safetensors") if not variant_of(path)))


def dtype_of(files: Iterable[Path]) -> torch.dtype:
    """What all float tensors of safetensors files are stored in: float16, bfloat16, or else float32."""
    found: set[str] = set()
    for path in files:
        try:
            with safe_open(str(path), "pt") as file:
                found |= {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError):  # loading it says what is wrong
            return torch.float32
    floats = {kind for kind in found if kind.startswith(("F", "BF"))}
    return HALVES.get(floats.pop(), torch.float32) if len(floats) == 1 else torch.float32


def variant_of(path: Path) -> str | None:
    """The variant in a weights file's name: "fp16" of diffusion_pytorch_model.fp16-00001-of-00002.safetensors."""
    middle = path.name.split(".")[1:-1]
    return middle[0].split("-0")[0] if middle else None


def compute_in_float32(network: torch.nn.Module) -> torch.nn.Module:
    """The network with float32 inputs, outputs and arithmetic; the large weights of Linear and Conv2d stay half."""
    for path, layer in network.named_modules():
        widened = _WIDENED.get(type(layer)) if path.split(".")[-1] not in LOOKED_AT else None
        for name, values in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if values.dtype not in HALVES.values():
                continue
            if name == "weight" and widened and values.numel() >= LARGE:
                layer.__class__ = widened
            elif isinstance(values, torch.nn.Parameter):
                values.data = values.data.float()
            else:
                setattr(layer, name, values.float())
    return network


class _Linear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight.float(), self.bias)


class _Conv2d(torch.nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight.float(), self.bias)


_WIDENED: dict[type, type] = {torch.nn.Linear: _Linear, torch.nn.Conv2d: _Conv2d}
