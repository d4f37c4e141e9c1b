"""One stage as a graph: what is left of it in memory."""

import weakref

import pytest
import torch

from imagine_flash.export.onnx import export_denoiser, export_text_encoder
from imagine_flash.export.sessions import give_back_memory
from imagine_flash.export.weights import WeightStore
from imagine_flash.pipelines.loading import load_stages

SIZE = (64, 64)


@pytest.mark.slow
def test_no_weight_outlives_its_network(student, tmp_path):
    """onnxscript's rules remember the last graph that they saw: the weights folded in it filled memory during the gate."""
    with torch.inference_mode():
        stages, store = load_stages(student), WeightStore(tmp_path / "weights.bin")
        networks = {"text_encoder": stages.text_encoder, "denoiser": stages.denoiser(SIZE)}
        weights = {
            f"{stage}.{name}": weakref.ref(parameter)
            for stage, network in networks.items()
            for name, parameter in network.named_parameters()
        }
        export_text_encoder(stages, store)
        export_denoiser(stages, store, SIZE)
    del stages, networks
    give_back_memory()
    assert weights and not [name for name, alive in weights.items() if alive() is not None]
