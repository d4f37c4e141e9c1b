"""What the network is told of the prompts: encoded as they are drawn, or once and kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...pipelines.networks import Conditions
from ..reproducible import fingerprint
from .kept import kept

if TYPE_CHECKING:
    from ..models import Model

_BATCH = 64


class Embeddings:
    """Row i is what the network is told of prompt i; with `path` all are encoded now, kept there in half precision, and the
    text encoders leave the device. The same file serves again while prompts and encoders are the same."""

    def __init__(self, model: Model, prompts: list[str], path: Path | None = None, source: str = "") -> None:
        """source: the hash of the folder that the encoders are of."""
        self.model = model
        parts = [model.tokens(prompts[i : i + 1000]) for i in range(0, len(prompts), 1000)]
        self.tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.count, self.kept = len(prompts), None
        if path is not None:
            self.kept = self._keep(path, fingerprint(source, prompts))
            model.stages.text_encoder.to("cpu")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: torch.Tensor) -> Conditions:
        """(len(rows), ...) each."""
        if self.kept is not None:
            return tuple(each[rows].float() for each in self.kept)
        return self.model.embed_tokens({name: ids[rows] for name, ids in self.tokens.items()})

    def _keep(self, path: Path, identity: str) -> Conditions:
        names, how = self.model.stages.conditions, {"dtype": torch.float16, "device": "cpu"}

        def encoded() -> dict[str, torch.Tensor]:
            columns: Conditions = ()
            for rows in torch.arange(self.count).split(_BATCH):
                found = self[rows]
                columns = columns or tuple(each.new_empty((self.count, *each.shape[1:]), **how) for each in found)
                for column, part in zip(columns, found, strict=True):
                    column[rows] = part.to(column)
            return dict(zip(names, columns, strict=True))

        found = kept(path, identity, encoded)
        return tuple(found[name] for name in names)
