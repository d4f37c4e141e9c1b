"""A server that runs for weeks: requests leave nothing behind."""

import gc
from pathlib import Path

import pytest

from imagine_flash.benchmarks.processes import grown_mb
from imagine_flash.engine import Engine


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_memory_is_flat(backend: str, tiny_artifact: Path) -> None:
    """After 200 requests, 2,000 more add less than 20 MB; a kept picture of each would be 25 MB."""
    pytest.importorskip(backend)
    pytest.importorskip("psutil")
    with Engine.load(tiny_artifact, backend=backend) as engine:
        engine.warm_up()
        gc.collect()
        assert grown_mb(engine, 2000, 1) < 20
        assert engine.batcher.waiting == 0 and engine.batcher.counts["failed"] == 0
