"""What a training or an evaluation computes on."""

from __future__ import annotations

import os
import re

import torch

from ..core.errors import ImagineFlashError


def use_device(name: str | None) -> torch.device:
    """Takes "cpu", "cuda" or "cuda:N" for this process, accelerate included; None: a GPU where there is one.

    Call it before anything is placed. Raises ImagineFlashError for a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise ImagineFlashError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return torch.device("cpu")
    index = int(found[1] or 0)
    if index >= torch.cuda.device_count():
        raise ImagineFlashError(
            f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs, no {name!r}; leave out --device for the CPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
