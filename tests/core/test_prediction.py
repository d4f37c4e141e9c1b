"""Each prediction type gives back the x0 and eps it was made from, in NumPy and in torch."""

import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ScheduleError
from imagine_flash.core.prediction import PREDICTION_TYPES, linear_coefficients, x0_and_eps


def scales(prediction_type):
    return (0.3, 0.7) if prediction_type == "flow" else (0.6, 0.8)


def network_output(prediction_type, x0, eps, alpha, sigma):
    """The network's output where x0 and eps are known: the definition of each prediction type."""
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[prediction_type]


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_round_trip(prediction_type, library):
    rng = np.random.default_rng(0)
    x0, eps = (library(rng.standard_normal((2, 4, 3, 3))) for _ in range(2))
    alpha, sigma = scales(prediction_type)
    m = network_output(prediction_type, x0, eps, alpha, sigma)
    x0_hat, eps_hat = x0_and_eps(prediction_type, alpha * x0 + sigma * eps, m, alpha, sigma)
    assert type(x0_hat) is type(eps_hat) is type(x0)
    np.testing.assert_allclose(x0_hat, x0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(eps_hat, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_coefficients_are_the_same_maps(prediction_type):
    rng = np.random.default_rng(1)
    x, m = rng.standard_normal((2, 5))
    alpha, sigma = scales(prediction_type)
    (a_x0, b_x0), (a_eps, b_eps) = linear_coefficients(prediction_type, alpha, sigma)
    x0, eps = x0_and_eps(prediction_type, x, m, alpha, sigma)
    np.testing.assert_allclose(a_x0 * x + b_x0 * m, x0, rtol=0, atol=1e-14)
    np.testing.assert_allclose(a_eps * x + b_eps * m, eps, rtol=0, atol=1e-14)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_coefficients_of_a_table_have_its_shape(prediction_type):
    alpha, sigma = (np.full((7,), scale) for scale in scales(prediction_type))
    for pair in linear_coefficients(prediction_type, alpha, sigma):
        assert [c.shape for c in pair] == [(7,), (7,)]
        assert all(c.dtype == np.float64 for c in pair)


def test_per_image_scales_broadcast_in_torch():
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    alpha = torch.tensor([0.6, 0.8]).view(2, 1, 1, 1)
    sigma = torch.tensor([0.8, 0.6]).view(2, 1, 1, 1)
    x0, _ = x0_and_eps("v_prediction", x, v, alpha, sigma)
    torch.testing.assert_close(x0[1], 0.8 * x[1] - 0.6 * v[1])


@pytest.mark.parametrize(
    ("prediction_type", "alpha", "sigma", "message"),
    [
        ("epsilon", 0.0, 1.0, "epsilon prediction has no x0 at alpha_t = 0"),
        ("epsilon", np.array([0.6, 0.0]), np.array([0.8, 1.0]), "use v_prediction or sample"),
        ("sample", 1.0, 0.0, "no eps at sigma_t = 0"),
        ("v", 0.6, 0.8, "prediction type must be one of epsilon, v_prediction, sample, flow, got 'v'"),
        ("v_predicton", 0.6, 0.8, "did you mean 'v_prediction'?"),
        (None, 0.6, 0.8, "got None"),
    ],
)
def test_undefined_closed_forms_say_so(prediction_type, alpha, sigma, message):
    with pytest.raises(ScheduleError) as caught:
        x0_and_eps(prediction_type, np.ones(2), np.ones(2), alpha, sigma)
    assert message in str(caught.value)
