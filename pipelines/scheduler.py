"""Imagine Flash's sampler inside diffusers: a scheduler for pipelines of people who stay there."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from pydantic import ValidationError

from ..core.diffusers_samplers import FLOW, FLOW_LCM, LCM, plan_of_sigmas, sampler_of
from ..core.errors import PlanError, ScheduleError
from ..core.plan import StepPlan
from ..core.prediction import linear_coefficients
from ..core.sampler import Sampler
from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable, update_table
from ..kernels.update import Coefficients, coefficients_on, noise_corrected_update


class ImagineFlashScheduler(SchedulerMixin, ConfigMixin):
    """A student's few steps, with noise correction (Kohler et al. 2024), as a drop-in for its own scheduler.

        pipe.scheduler = ImagineFlashScheduler.from_config(pipe.scheduler.config)
        pipe("a cat", num_inference_steps=3, guidance_scale=1.0)

    Timesteps are those that the student was distilled for (`plans`, by number of steps, which its folder's config holds), for
    other numbers trailing (3 steps: 999, 666, 333), or what the pipeline is called with as `timesteps`. Noise correction applies
    to a step from the last timestep: in image to image, where all steps are left. `sampler`, the fields of core's Sampler, is in
    a student's config too: without it steps are deterministic, or re-noised where that config is of LCMScheduler or
    FlowMatchLCMScheduler. `shift` makes it the rectified flow of
    Stable Diffusion 3, whose networks are told T sigma_t; the betas and prediction_type are not read then. docs/diffusers.md
    has the pipelines. Raises ScheduleError and PlanError.
    """

    order = 1
    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["LCMScheduler", "TCDScheduler"]  # flows have no betas
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        noise_correction: bool = True,
        shift: float | None = None,
        plans: dict[str, list[int]] | None = None,
        sampler: dict[str, Any] | None = None,
    ) -> None:
        self.sampler = _sampler(sampler)
        flow = {} if shift is None else {"_class_name": FLOW}
        self.schedule = NoiseSchedule.from_scheduler_config({**dict(self.config), **flow})
        self.alphas_cumprod = torch.from_numpy(
            self.schedule.alpha**2
        ).float()  # these are read by pipelines and trainers
        self.betas = _betas(self.schedule.alpha**2) if trained_betas is None else torch.tensor(trained_betas).float()
        self._use(StepPlan.trailing(3, num_train_timesteps), None)

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of the noise schedule that another scheduler's config describes; `kwargs` replace its values.

        Unlike diffusers' own classes it also keeps what that scheduler took by default: the network was trained on it.
        Raises ScheduleError for a config whose noise levels are no fixed table.
        """
        if isinstance(config, dict) and config.get("_class_name") != cls.__name__:
            config = _settled({**config, **{k: v for k, v in kwargs.items() if k in config}})
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """The plan: the student's own of `num_inference_steps`, else trailing, or the given, strictly decreasing `timesteps`,
        as the network is told them: of a flow T sigma, such as diffusers' own 1000, 857.1, 600."""
        given: Any = timesteps if timesteps is not None else num_inference_steps
        given = given.tolist() if hasattr(given, "tolist") else given  # of NumPy or torch
        if given is None:
            raise PlanError("give num_inference_steps or timesteps")
        plans: Any = self.config.plans or {}  # type: ignore[attr-defined]
        if timesteps is not None:
            plan = self._plan_of_times(given)
        elif (known := plans.get(str(given))) is not None:
            plan = StepPlan(known)
        else:
            plan = StepPlan.trailing(given, self.schedule.num_train_timesteps)
        self._use(plan, device)

    def _plan_of_times(self, times: list[float]) -> StepPlan:
        if self.schedule.kind != "flow":
            return StepPlan(tuple(times))
        T = self.schedule.num_train_timesteps
        for time in times:
            if not 0 < time <= T:
                raise PlanError(f"the time of a flow must be in (0, {T}], got {time:g}")
        return plan_of_sigmas(np.asarray(times) / T, dict(self.config)["shift"], T)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network reads x_t as it is."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where image to image starts; nothing depends on it, since a step is found by its timestep."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x_s from x_t (`sample`) and the network's output, and the x0 that it implies: as DDIMScheduler.step.

        Computed in float32, returned in the sample's dtype; at the last step the two are one tensor. Waits for the device
        that `timestep` is on. generator: of the noise that a re-noising student's steps add, one or one an image; other steps
        draw none. eta, which diffusers' pipelines pass on, must be 0: the sampler alone says how much is drawn anew.
        """
        if eta != 0.0:
            raise ScheduleError(
                f"eta must be 0, got {eta:g}: the student's sampler says what is drawn anew; take DDIMScheduler for others"
            )
        t = float(timestep)
        if t not in self._positions:
            plan = self.timesteps.tolist()
            raise ScheduleError(f"timestep {t:g} is not in the plan {plan}; call set_timesteps first")
        row, coefficients = self._positions[t], self._on(sample.device)
        noise = None
        if coefficients.renoises[row]:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        out = noise_corrected_update(sample, model_output, coefficients, row, noise=noise, out=_like(sample))
        x0 = out
        if row < len(self._positions) - 1:
            x0_row = coefficients.starts[1] + row
            x0 = noise_corrected_update(sample, model_output, coefficients, x0_row, out=_like(sample))
        return DDIMSchedulerOutput(prev_sample=out, pred_original_sample=x0) if return_dict else (out, x0)

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t x0 + sigma_t eps at `timesteps` (B,) or (1,), as the network is told them."""
        if not timesteps.numel():  # image to image keeps int(steps * strength) steps
            n = self.num_inference_steps
            raise PlanError(f"strength leaves none of {n} step(s): it must be at least {math.ceil(100 / n) / 100:g}")
        told = timesteps.cpu().double().numpy()
        if self.schedule.kind == "flow":
            sigma = told / self.schedule.num_train_timesteps
            alpha = 1.0 - sigma
        else:
            alpha, sigma = self.schedule.at(told)
        shape = (-1, *(1,) * (original.ndim - 1))
        alpha, sigma = (
            torch.as_tensor(v, dtype=original.dtype).to(original.device).view(shape) for v in (alpha, sigma)
        )
        return alpha * original + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` by the name and in the order of flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def _use(self, plan: StepPlan, device: str | torch.device | None) -> None:
        config: Any = self.config
        flow = self.schedule.kind == "flow"
        kind = "flow" if flow else config.prediction_type
        correction, sampler = config.noise_correction, self.sampler
        table = update_table(self.schedule, plan, kind, noise_correction=correction, sampler=sampler)
        self.init_noise_sigma = table.start
        (a, b), _ = linear_coefficients(kind, *self.schedule.at(table.timesteps))
        self._tables = table, UpdateTable(a, b, np.zeros(len(plan)), table.timesteps)  # to x_s, to x0
        self._coefficients: Coefficients | None = None
        self.num_inference_steps = len(plan)
        whole = all(isinstance(t, int) for t in plan)
        dtype = torch.int64 if whole and not flow else torch.float32
        told = torch.tensor(self.schedule.network_time(table.timesteps), dtype=dtype)
        self._positions = {float(t): i for i, t in enumerate(told)}
        self.timesteps = told.to(device)

    def _on(self, device: torch.device) -> Coefficients:
        if self._coefficients is None or self._coefficients.rows.device != device:
            self._coefficients = coefficients_on(device, *self._tables)
        return self._coefficients


def _betas(alpha_bar: NDArray[np.float64]) -> torch.Tensor:
    """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, float32 (T,)."""
    return torch.from_numpy(1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])).float()


def _like(x: torch.Tensor) -> torch.Tensor:
    """Room for a result, in x's dtype and, where it is one that the update writes, its layout."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _sampler(values: Mapping[str, Any] | None) -> Sampler:
    try:
        return Sampler(**(values or {}))
    except ValidationError as error:
        raise ScheduleError(
            f"sampler {values}: {error.errors()[0]['msg']}; leave it out for deterministic steps"
        ) from None


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Another scheduler's config with what that class takes for a key left out, with `shift` if it is a flow, and with the sampler
    of a class that re-noises.

    `.config` has the class's name only where it was read from a file: a flow's is then known by its keys. ScheduleError.
    """
    values = {key: value for key, value in config.items() if key != "_use_default_values"}
    betas = "beta_schedule" in values or values.get("trained_betas") is not None
    name = str(values.get("_class_name") or ("DDIMScheduler" if betas else FLOW if "shift" in values else ""))
    owner = getattr(diffusers, name, None)
    if isinstance(owner, type) and issubclass(owner, SchedulerMixin):
        ours = inspect.signature(ImagineFlashScheduler).parameters
        for key, parameter in inspect.signature(owner).parameters.items():
            if key in ours and parameter.default is not inspect.Parameter.empty:
                values.setdefault(key, parameter.default)
    for key, usual in (("timestep_type", "discrete"), ("invert_sigmas", False)):
        if values.get(key, usual) != usual:
            raise ScheduleError(
                f"{key}={values[key]!r} is not supported: such a network is told other times; use {usual!r}"
            )
    if name in (LCM, FLOW_LCM) or (name == FLOW and values.get("stochastic_sampling")):
        values.setdefault("sampler", sampler_of({**values, "_class_name": name}).model_dump(exclude_defaults=True))
    NoiseSchedule.from_scheduler_config({**values, "_class_name": name})
    return values
