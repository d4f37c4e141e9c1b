"""What every part needs: an engine here, the same one behind a server, and what its pictures must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engine import Engine, GenerateRequest
from ..pictures import Limits, check_pictures, limits_of, precision_of
from ..schema import Check
from .clients import Server

HTTP, ON_RAY = "HTTP", "HTTP, Ray Serve"
CLIENTS, REPLICAS = 64, 2  # of HTTP at once; of the server on Ray, each with its share of the processors


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every part needs: the engine in this process, and the same one behind a server."""

    folder: Path
    engine: Engine
    server: Server

    def about(self, what: str, **further: object) -> dict[str, object]:
        return {"what": what, "backend": self.engine.backend.name, "precision": precision_of(self.engine), **further}

    @property
    def limits(self) -> Limits:
        return limits_of(self.engine.artifact, precision_of(self.engine))

    def check(self, got: Sequence[NDArray[np.uint8]], requests: Sequence[GenerateRequest]) -> Check:
        """Pictures against the engine's of the same requests, drawn alone in this process; `overhead` checks against torch's."""
        expected = np.concatenate([self.engine.generate(request).images for request in requests])
        return check_pictures(
            np.stack(got) if got else expected[:0], expected, self.limits, "the engine's, drawn alone"
        )
