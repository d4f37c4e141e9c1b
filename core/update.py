"""The sampler's step as coefficients, x_s = A x_t + B m + C z, and the definition of correct for every backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import PlanError, ScheduleError
from .plan import StepPlan
from .prediction import check_prediction_type, linear_coefficients
from .sampler import DETERMINISTIC, Sampler
from .schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class UpdateTable:
    """One row per step of a plan: x_s = a x_t + b m + c z, beginning with x_T = start z.

    a, b, c: float64 (n_steps,); timesteps: float64 (n_steps,), the timestep index at which the network is asked for m.
    c is 0 where the sampler draws no fresh noise, and in the last row.
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    c: NDArray[np.float64]
    timesteps: NDArray[np.float64]
    start: float = 1.0

    @property
    def renoised(self) -> tuple[int, ...]:
        """The steps that need fresh noise."""
        return tuple(int(i) for i in np.flatnonzero(self.c))

    def __len__(self) -> int:
        return len(self.timesteps)


def update_table(
    schedule: NoiseSchedule,
    plan: StepPlan,
    prediction_type: str,
    *,
    noise_correction: bool = True,
    sampler: Sampler = DETERMINISTIC,
) -> UpdateTable:
    """The coefficients of every step of `plan`, float64.

    A step from t to the next, less noisy s is x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps_dir + c z: c and x0 are the
    sampler's. The last step lands on x0 (alpha_s = 1, sigma_s = 0) or the least noisy level. With noise correction eps_dir =
    x_T at the first step of a plan that starts at T - 1, else it is the network's eps (Kohler et al. 2024).
    Raises ScheduleError where the closed form is undefined, PlanError for timesteps outside the schedule.
    """
    _check_kind(schedule, prediction_type)
    t = np.array(plan.timesteps, dtype=np.float64)
    last = schedule.num_train_timesteps - 1
    if t[0] > last:
        raise PlanError(f"timestep {plan.timesteps[0]} is outside the schedule's 0..{last}")
    alpha_t, sigma_t = schedule.at(t)
    end = (1.0, 0.0) if sampler.end == "clean" else schedule.at(0)
    alpha_s, sigma_s = np.append(alpha_t[1:], end[0]), np.append(sigma_t[1:], end[1])
    (a_x0, b_x0), (a_eps, b_eps) = linear_coefficients(prediction_type, alpha_t, sigma_t)
    c_skip, c_out = sampler.scalings(t)
    a_x0, b_x0 = c_out * a_x0 + c_skip, c_out * b_x0
    corrected = noise_correction & (t == last)  # only the first timestep can be T - 1
    a_eps, b_eps = np.where(corrected, 1.0, a_eps), np.where(corrected, 0.0, b_eps)
    c = np.append(sampler.fresh_noise(schedule, t[:-1], t[1:]), 0.0)
    direction = np.sqrt(np.maximum(0.0, sigma_s**2 - c**2))
    start = float(sigma_t[0]) if sampler.start == "sigma" else 1.0
    return UpdateTable(alpha_s * a_x0 + direction * a_eps, alpha_s * b_x0 + direction * b_eps, c, t, start)


def reference_update(
    x: NDArray,
    m: NDArray,
    table: UpdateTable,
    step_index: ArrayLike,
    *,
    uncond: NDArray | None = None,
    guidance: ArrayLike | None = None,
    noise: NDArray | None = None,
) -> NDArray:
    """x_s = a x + b m + c noise, the rows of `table` chosen by step_index. The oracle for kernels and backends.

    x, m, uncond, noise: (B, ...); step_index: an int for the whole batch or ints (B,), one per image; guidance w: a
    number or (B,), then m = uncond + w (m - uncond). Computed in float64, returned in x's dtype. Raises ScheduleError
    if the table re-noises and `noise` is missing, or if only one of uncond and guidance is given.
    """
    if (uncond is None) != (guidance is None):
        raise ScheduleError("guidance needs both uncond and guidance")
    index = np.asarray(step_index)
    a, b, c = (_per_image(row[index], x.ndim) for row in (table.a, table.b, table.c))
    m64 = m.astype(np.float64)
    if uncond is not None:
        m64 = uncond + _per_image(np.asarray(guidance, dtype=np.float64), x.ndim) * (m64 - uncond)
    x_s = a * x.astype(np.float64) + b * m64
    if np.any(c != 0):
        if noise is None:
            raise ScheduleError("this table re-noises: pass noise of the shape of x")
        x_s = x_s + c * noise.astype(np.float64)
    return x_s.astype(x.dtype)


def sample(
    denoiser: Callable[[Any, Any], Any],
    noise: Any,
    table: UpdateTable,
    *,
    steps: int | None = None,
    noises: Sequence[Any] | None = None,
) -> Any:
    """x0 from unit noise (B, ...) by every step of `table`, or x_t after the first `steps`; of any array library.

    denoiser(x_t, t) gives m of x_t's shape and dtype (that of the noise), in which the steps are computed; t is the step's
    timestep index, a float. noises: one array per step (the last is not used), needed only if the table re-noises.
    """
    x = noise if table.start == 1.0 else table.start * noise
    for i, t in enumerate(table.timesteps[:steps].tolist()):
        a, b, c = float(table.a[i]), float(table.b[i]), float(table.c[i])
        x = a * x + b * denoiser(x, t)
        if c:
            if noises is None:
                raise ScheduleError("this table re-noises: pass one array of noise per step")
            x = x + c * noises[i]
    return x


def _check_kind(schedule: NoiseSchedule, prediction_type: str) -> None:
    check_prediction_type(prediction_type)
    if prediction_type == "flow" and schedule.kind != "flow":
        raise ScheduleError("flow prediction needs a flow schedule (alpha = 1 - sigma); this one preserves variance")
    if prediction_type == "v_prediction" and schedule.kind == "flow":
        raise ScheduleError("v_prediction needs a variance-preserving schedule; on a flow schedule use 'flow'")


def _per_image(values: NDArray, ndim: int) -> NDArray:
    """Shape () stays; (B,) becomes (B, 1, ..., 1)."""
    return values.reshape(values.shape + (1,) * (ndim - 1)) if values.ndim else values
