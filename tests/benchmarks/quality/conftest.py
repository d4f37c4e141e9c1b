"""Fixtures of the evaluation's tests."""

from pathlib import Path

import pytest


@pytest.fixture
def untrained_judge(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    from imagine_flash.benchmarks.quality.judge import Judge

    torch.manual_seed(0)
    weights = {name: v.contiguous() for name, v in Judge().state_dict().items()}
    save_file(weights, tmp_path / "judge", {"seen_all": "0.5"})
    return tmp_path / "judge"
