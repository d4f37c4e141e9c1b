"""Noise schedules as float64 tables: x_t = alpha_t x0 + sigma_t eps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ScheduleError, nearest

Kind = Literal["variance_preserving", "flow"]
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SCM_CLASS = "SCMScheduler"  # SANA-Sprint's: its trigonometric times are a flow's, x_flow = x_trig / (cos t + sin t)
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", SCM_CLASS)
# What diffusers' DDIMScheduler and DDPMScheduler take for a key that the config leaves out; other classes differ.
_DDPM_DEFAULTS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_DDPM_CLASSES = ("", "DDIMScheduler", "DDPMScheduler")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The scales of signal and noise at every training timestep.

    alpha, sigma: float64 (T,), read-only; index 0 is the least noisy. alpha is the square root of diffusers'
    `alphas_cumprod`. kind: "variance_preserving" (alpha^2 + sigma^2 = 1) or "flow" (alpha + sigma = 1).
    config: the diffusers scheduler config the tables were built from, if any. Raises ScheduleError.
    """

    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]
    kind: Kind = "variance_preserving"
    config: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<NoiseSchedule {self.kind}, {len(self.alpha)} timesteps>"

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            table = np.array(getattr(self, name), dtype=np.float64)
            table.setflags(write=False)
            object.__setattr__(self, name, table)
        if self.kind not in ("variance_preserving", "flow"):
            raise ScheduleError(f"kind must be 'variance_preserving' or 'flow', got {self.kind!r}")
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or not self.alpha.size:
            raise ScheduleError(
                f"alpha and sigma must be two tables of one length, got {self.alpha.shape}, {self.sigma.shape}"
            )
        power = 2 if self.kind == "variance_preserving" else 1
        total = self.alpha**power + self.sigma**power
        if min(self.alpha.min(), self.sigma.min()) < 0 or not np.allclose(total, 1.0, rtol=0, atol=1e-6):
            raise ScheduleError(f"alpha^{power} + sigma^{power} must be 1 with both >= 0 for a {self.kind} schedule")

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the tables."""
        return int(self.alpha.shape[0])

    @property
    def signal_at_T(self) -> float:
        """alpha at the noisiest timestep: 0.0683 for Stable Diffusion, 0 with zero terminal SNR."""
        return float(self.alpha[-1])

    def at(self, t: ArrayLike) -> tuple[Any, Any]:
        """(alpha_t, sigma_t), float64, in the shape of t: timestep indices in 0..T-1.

        Whole numbers give the exact table entries. Between them a flow schedule has its closed form where it was built from
        a config, else the line between the two entries; a variance-preserving one the line between their sigma / alpha, as
        diffusers' Euler schedulers read it. Raises ScheduleError.
        """
        steps = np.asarray(t, dtype=np.float64)
        last = self.num_train_timesteps - 1
        if not np.all((steps >= 0) & (steps <= last)):
            raise ScheduleError(f"timestep must be between 0 and {last}, got {t}")
        index = steps.astype(np.int64)
        between = steps != index
        if not between.any():
            return self.alpha[index], self.sigma[index]
        grid = np.arange(last + 1)
        if self.kind == "flow":
            shift = None if self.config is None else self.config.get("shift", 1.0)
            sigma = np.interp(steps, grid, self.sigma) if shift is None else shifted((steps + 1) / (last + 1), shift)
            return 1.0 - sigma, sigma
        if not self.alpha.all() and np.any(between & (steps > last - 1)):
            raise ScheduleError(f"a schedule of zero terminal SNR has nothing between {last - 1} and {last}, got {t}")
        ratio = np.interp(steps, grid, self.sigma / np.where(self.alpha > 0, self.alpha, np.inf))
        alpha, sigma = 1.0 / np.sqrt(1.0 + ratio**2), ratio / np.sqrt(1.0 + ratio**2)
        return np.where(between, alpha, self.alpha[index]), np.where(between, sigma, self.sigma[index])

    def network_time(self, t: ArrayLike) -> NDArray[np.float64]:
        """What the network is told at timestep index t: t itself, or T sigma_t for flow (diffusers' convention)."""
        if self.kind == "flow":
            return np.asarray(self.at(t)[1] * self.num_train_timesteps, dtype=np.float64)
        return np.asarray(t, dtype=np.float64)

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule that a diffusers `scheduler_config.json` describes.

        Reads _class_name, num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
        rescale_betas_zero_snr, and shift for flow matching; other keys do not change the schedule. Note that diffusers
        puts _class_name into the file, but not into a scheduler's `.config`: a config without it must say
        beta_schedule or trained_betas. Raises ScheduleError for what it cannot represent.
        """
        steps, kept = whole_number("num_train_timesteps", config.get("num_train_timesteps", 1000)), dict(config)
        if is_flow(config):
            sigma = _flow_sigmas(config, steps)
            return cls(1.0 - sigma, sigma, "flow", kept)
        if config.get("use_flow_sigmas"):
            raise ScheduleError("use_flow_sigmas is not supported; use a FlowMatchEulerDiscreteScheduler config")
        alpha_bar: NDArray[np.float64] = np.cumprod(1.0 - _betas(config, steps), dtype=np.float64)
        if config.get("rescale_betas_zero_snr"):
            alpha_bar = rescale_zero_terminal_snr(alpha_bar)
        return cls(np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar), "variance_preserving", kept)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler config is of a rectified flow."""
    name = str(config.get("_class_name", ""))
    return name.startswith("FlowMatch") or name == SCM_CLASS


def whole_number(key: str, value: Any, *, least: int = 1) -> int:
    """What a scheduler config says under `key`. Raises ScheduleError for what is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"{key} must be a whole number >= {least}, got {value!r}")
    return value


def positive(key: str, value: Any) -> float:
    """What a scheduler config says under `key`. Raises ScheduleError for what is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ScheduleError(f"{key} must be a number > 0, got {value!r}")
    return value


def prediction_type_of(config: Mapping[str, Any]) -> str:
    """What the network predicts, from a diffusers scheduler config; a flow's has no field for it."""
    return "flow" if is_flow(config) else config.get("prediction_type", "epsilon")


def rescale_zero_terminal_snr(alpha_bar: NDArray[np.float64]) -> NDArray[np.float64]:
    """alphas_cumprod shifted and scaled so that the last is 0 and the first is kept (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(np.asarray(alpha_bar, dtype=np.float64))
    if root.size < 2 or root[0] <= root[-1]:
        raise ScheduleError("zero terminal SNR needs at least two timesteps of decreasing signal")
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _betas(config: Mapping[str, Any], steps: int) -> NDArray[np.float64]:
    """beta_t, float64 (T,), as diffusers' schedulers define it."""
    trained = config.get("trained_betas")
    if trained is not None:
        try:
            betas = np.asarray(trained, dtype=np.float64)
        except (TypeError, ValueError):
            raise ScheduleError(f"trained_betas must hold numbers, got {str(trained)[:80]}") from None
        if betas.shape != (steps,):
            raise ScheduleError(f"trained_betas must hold num_train_timesteps = {steps} values, got {betas.size}")
    else:
        kind = _beta_setting(config, "beta_schedule")
        if kind == "squaredcos_cap_v2":
            betas = _squared_cosine_betas(steps)
        elif kind in BETA_SCHEDULES:
            start, end = (positive(key, _beta_setting(config, key)) for key in ("beta_start", "beta_end"))
            root = kind == "scaled_linear"
            betas = np.linspace(start**0.5, end**0.5, steps) ** 2 if root else np.linspace(start, end, steps)
        else:
            raise ScheduleError(
                f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {kind!r}{nearest(kind, BETA_SCHEDULES)}"
            )
    if not np.all((betas > 0) & (betas <= 1)):
        raise ScheduleError(f"betas must be in (0, 1], got {betas.min():g} to {betas.max():g}")
    return betas


def _beta_setting(config: Mapping[str, Any], key: str) -> Any:
    if key in config:
        return config[key]
    name = str(config.get("_class_name", ""))
    if name not in _DDPM_CLASSES:
        raise ScheduleError(f"the scheduler config of {name} has no {key!r}; save it again with diffusers")
    if not name and key == "beta_schedule":
        raise ScheduleError("the scheduler config has neither '_class_name' nor 'beta_schedule'; read it from its file")
    return _DDPM_DEFAULTS[key]


def _squared_cosine_betas(steps: int) -> NDArray[np.float64]:
    """beta_t = 1 - f(t+1) / f(t) <= 0.999, f(t) = cos^2((t/T + 0.008) / 1.008 * pi/2) (Nichol & Dhariwal 2021)."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - f[1:] / f[:-1], 0.999)


def _flow_sigmas(config: Mapping[str, Any], steps: int) -> NDArray[np.float64]:
    """sigma_i of u = (i + 1) / T, shifted."""
    if config["_class_name"] not in FLOW_CLASSES:
        raise ScheduleError(f"unknown flow scheduler {config['_class_name']!r}; known: {', '.join(FLOW_CLASSES)}")
    for key in ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(key):
            raise ScheduleError(
                f"{key} is not supported: its noise levels are no fixed table; set a fixed shift instead"
            )
    return shifted(np.arange(1, steps + 1, dtype=np.float64) / steps, positive("shift", config.get("shift", 1.0)))


def shifted(u: Any, shift: float) -> Any:
    """sigma = s u / (1 + (s - 1) u), s = shift: a flow's noise level of u in 0..1 (Esser et al. 2024, eq. 23)."""
    return shift * u / (1.0 + (shift - 1.0) * u)
