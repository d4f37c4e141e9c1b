"""From a network's output m to the clean estimate x0 and the noise eps, for each prediction type.

Pure functions of arrays and scalars: they take NumPy arrays and torch tensors alike (no array library is imported but
NumPy). Shapes: x_t and m (B, ...); alpha_t and sigma_t scalars or anything that broadcasts. Where a closed form is
undefined (a division by zero) the functions raise ScheduleError for scales on the host; a scale that is a device tensor
is not looked at, since that would wait for the device: check the schedule once with `linear_coefficients`.
"""

from typing import Any

import numpy as np

from .errors import ScheduleError, nearest

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")

Coefficients = tuple[Any, Any]


def x0_from_epsilon(x_t: Any, eps: Any, alpha_t: Any, sigma_t: Any) -> Any:
    """x0 = (x_t - sigma_t eps) / alpha_t, for alpha_t > 0 (Ho et al. 2020, eq. 15)."""
    _refuse_zero(alpha_t, "epsilon prediction has no x0 at alpha_t = 0 (zero terminal SNR): use v_prediction or sample")
    return (x_t - sigma_t * eps) / alpha_t


def x0_from_v(x_t: Any, v: Any, alpha_t: Any, sigma_t: Any) -> Any:
    """x0 = alpha_t x_t - sigma_t v, where alpha_t^2 + sigma_t^2 = 1 (Salimans & Ho 2022, eq. 9)."""
    return alpha_t * x_t - sigma_t * v


def eps_from_v(x_t: Any, v: Any, alpha_t: Any, sigma_t: Any) -> Any:
    """eps = sigma_t x_t + alpha_t v, where alpha_t^2 + sigma_t^2 = 1 (Salimans & Ho 2022)."""
    return sigma_t * x_t + alpha_t * v


def eps_from_sample(x_t: Any, x0: Any, alpha_t: Any, sigma_t: Any) -> Any:
    """eps = (x_t - alpha_t x0) / sigma_t, for sigma_t > 0."""
    _refuse_zero(sigma_t, "a predicted sample has no eps at sigma_t = 0: x_t is already clean there")
    return (x_t - alpha_t * x0) / sigma_t


def x0_from_flow(x_t: Any, u: Any, sigma_t: Any) -> Any:
    """x0 = x_t - sigma_t u, where u = eps - x0 and alpha_t = 1 - sigma_t (Liu et al. 2022; Esser et al. 2024)."""
    return x_t - sigma_t * u


def eps_from_flow(x_t: Any, u: Any, alpha_t: Any) -> Any:
    """eps = x_t + alpha_t u, where u = eps - x0 and alpha_t = 1 - sigma_t."""
    return x_t + alpha_t * u


def x0_and_eps(prediction_type: str, x_t: Any, m: Any, alpha_t: Any, sigma_t: Any) -> tuple[Any, Any]:
    """(x0, eps) from the network's output m at x_t. Shapes as x_t. Raises ScheduleError (module docstring)."""
    if prediction_type == "epsilon":
        return x0_from_epsilon(x_t, m, alpha_t, sigma_t), m
    if prediction_type == "v_prediction":
        return x0_from_v(x_t, m, alpha_t, sigma_t), eps_from_v(x_t, m, alpha_t, sigma_t)
    if prediction_type == "sample":
        return m, eps_from_sample(x_t, m, alpha_t, sigma_t)
    check_prediction_type(prediction_type)
    return x0_from_flow(x_t, m, sigma_t), eps_from_flow(x_t, m, alpha_t)


def linear_coefficients(prediction_type: str, alpha_t: Any, sigma_t: Any) -> tuple[Coefficients, Coefficients]:
    """((a_x0, b_x0), (a_eps, b_eps)) with x0 = a_x0 x_t + b_x0 m and eps = a_eps x_t + b_eps m, float64.

    alpha_t, sigma_t: scalars or arrays; the coefficients have their shape. Raises ScheduleError (module docstring).
    """
    alpha, sigma = np.asarray(alpha_t, dtype=np.float64), np.asarray(sigma_t, dtype=np.float64)
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    a_x0, a_eps = x0_and_eps(
        prediction_type, one, zero, alpha, sigma
    )  # both are linear: read them off at (1, 0), (0, 1)
    b_x0, b_eps = x0_and_eps(prediction_type, zero, one, alpha, sigma)
    return (a_x0, b_x0), (a_eps, b_eps)


def check_prediction_type(prediction_type: object) -> None:
    """Raises ScheduleError unless `prediction_type` is one of PREDICTION_TYPES."""
    if prediction_type not in PREDICTION_TYPES:
        raise ScheduleError(
            f"prediction type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
            f"{nearest(prediction_type, PREDICTION_TYPES)}"
        )


def _refuse_zero(scale: Any, message: str) -> None:
    if isinstance(scale, int | float | np.ndarray | np.generic) and np.any(np.asarray(scale) == 0):
        raise ScheduleError(message)
