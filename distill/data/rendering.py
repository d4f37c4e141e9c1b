"""Rendering many scenes on all cores: PyTorch's DataLoader around `EmojiScenes`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .emoji import EmojiScenes


class _Batches(Dataset[np.ndarray]):
    def __init__(self, scenes: EmojiScenes, count: int, batch: int, start: int) -> None:
        self.scenes, self.count, self.batch, self.start = scenes, count, batch, start

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __getitem__(self, index: int) -> np.ndarray:
        first = index * self.batch
        return np.stack([self.scenes[self.start + i].image for i in range(first, min(first + self.batch, self.count))])


def rendered(scenes: EmojiScenes, count: int, *, batch: int = 100, start: int = 0) -> Iterator[np.ndarray]:
    """Pictures `start` to `start + count` of a stream, in order, as (batch, H, W, 3) uint8."""
    workers = min(os.cpu_count() or 1, count // (10 * batch))  # processes are not worth their start for a few
    batches = _Batches(scenes, count, batch, start)
    loader: Any = DataLoader(batches, batch_size=None, num_workers=workers, worker_init_fn=_one_thread)
    for images in loader:
        yield images.numpy()


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def to_signed(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
