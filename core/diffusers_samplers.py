"""What diffusers' own schedulers would do, read from their config: the sampler, and which timesteps are visited."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import PlanError, ScheduleError, nearest
from .plan import StepPlan
from .sampler import Sampler
from .schedule import SCM_CLASS, positive, shifted, whole_number

EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
FLOW, FLOW_LCM = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
DDIM, LCM, TCD = "DDIMScheduler", "LCMScheduler", "TCDScheduler"
EVEN = ("FluxPipeline",)  # pipelines that give the noise levels 1, (n - 1) / n, ... 1 / n to their scheduler
KNOWN = (DDIM, EULER, ANCESTRAL, LCM, TCD, FLOW, FLOW_LCM, SCM_CLASS)
_SPACING = {DDIM: "leading", EULER: "linspace", ANCESTRAL: "linspace"}  # where the config leaves it out
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_OF_FLOWS = (*_SPACINGS, "use_dynamic_shifting", "invert_sigmas")
_UNREAD = {
    EULER: _SPACINGS,
    FLOW: _OF_FLOWS,
    FLOW_LCM: _OF_FLOWS,
}  # by the classes that take them; others pass over them
_WAY_OUT = "choose --sampler deterministic, and --steps or --timesteps"
_CLIPPING = (DDIM, LCM, TCD)  # classes that may clip x0


def sampler_of(config: Mapping[str, Any]) -> Sampler:
    """The sampler that the class in a diffusers scheduler config is. Raises ScheduleError for one that is no row of the
    update table, such as multistep solvers."""
    name = _known_class(config)
    if name == DDIM:
        return Sampler(end="clean" if config.get("set_alpha_to_one", True) else "least")
    if name in (EULER, ANCESTRAL):
        kind = "deterministic" if name == EULER else "ancestral"
        return Sampler(kind=kind, start="unit" if _spacing(config) == "leading" else "sigma")
    if name == LCM:
        return Sampler(kind="renoise", boundary=positive("timestep_scaling", config.get("timestep_scaling", 10.0)))
    if name == TCD:
        return Sampler(kind="strategic", end="least")
    return Sampler(kind="renoise" if name != FLOW or config.get("stochastic_sampling") else "deterministic")


def plan_of(config: Mapping[str, Any], steps: int, pipeline: str = "") -> StepPlan:
    """The timesteps that the class in a diffusers scheduler config visits in so many steps, in a pipeline of that class: some
    say themselves where a flow begins and ends. Raises PlanError, ScheduleError.
    """
    name, total = _known_class(config), whole_number("num_train_timesteps", config.get("num_train_timesteps", 1000))
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < total:
        raise PlanError(f"a plan has between 1 and {total - 1} steps, got {steps!r}", param="steps")
    if name in (LCM, TCD):
        trained = whole_number("original_inference_steps", config.get("original_inference_steps") or 50)
        return _of_trained_steps(total, trained, steps)
    if name == SCM_CLASS:  # angles of pi/2 at pure noise; the pipeline's middle one of two steps is 1.3
        angles = np.array([math.pi / 2, 1.3]) if steps == 2 else np.linspace(math.pi / 2, 0.0, steps + 1)[:-1]
        return plan_of_sigmas(np.sin(angles) / (np.cos(angles) + np.sin(angles)), 1.0, total)
    if name in (FLOW, FLOW_LCM):
        shift = positive("shift", config.get("shift", 1.0))
        least = 1.0 / steps if pipeline in EVEN else shifted(1.0 / total, shift)  # shifted, then all once more
        sigma = shifted(np.linspace(1.0, least, steps), shift)
        return plan_of_sigmas(_ending(config, sigma), shift, total)
    spacing, offset = _spacing(config), whole_number("steps_offset", config.get("steps_offset", 0), least=0)
    if spacing == "linspace":
        visited = np.linspace(0, total - 1, steps)[::-1]
        return StepPlan(tuple((visited.round() if name == DDIM else visited).tolist()))
    if spacing == "leading":
        return StepPlan(tuple((np.arange(steps)[::-1] * (total // steps) + offset).tolist()))
    return StepPlan(tuple((np.arange(total, 0, -total / steps).round() - 1).tolist()))


def _known_class(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name", ""))
    if name not in KNOWN:
        raise ScheduleError(
            f"the scheduler {name or 'without a class name'} has no closed form of one step{nearest(name, KNOWN)}; "
            "choose --sampler deterministic or renoise, and --steps or --timesteps"
        )
    for key in _UNREAD.get(name, ()):
        if config.get(key):
            raise ScheduleError(f"the scheduler's {key} is not supported; {_WAY_OUT}")
    if name in _CLIPPING and (config.get("thresholding") or config.get("clip_sample", name == DDIM)):
        raise ScheduleError(
            f"this {name} clips x0 (clip_sample, thresholding), which is no linear step; set them false"
        )
    if name == EULER and config.get("final_sigmas_type", "zero") != "zero":
        raise ScheduleError(f"this {name} ends on a noise level (final_sigmas_type); {_WAY_OUT}")
    if name == EULER and config.get("interpolation_type", "linear") != "linear":
        raise ScheduleError(f"this {name} has noise levels that are no table of timesteps; {_WAY_OUT}")
    if name == EULER and config.get("timestep_type", "discrete") != "discrete":
        raise ScheduleError(f"this {name} tells its network noise levels, which are no table of timesteps")
    return name


def _spacing(config: Mapping[str, Any]) -> str:
    spacing = config.get("timestep_spacing") or _SPACING[str(config["_class_name"])]
    if spacing not in ("linspace", "leading", "trailing"):
        raise ScheduleError(f"timestep_spacing must be linspace, leading or trailing, got {spacing!r}")
    return spacing


def _ending(config: Mapping[str, Any], sigma: Any) -> Any:
    """A flow's noise levels, stretched so that the last is shift_terminal, where the config has one."""
    if not config.get("shift_terminal"):
        return sigma
    last = positive("shift_terminal", config["shift_terminal"])
    if last >= 1 or len(sigma) == 1:  # diffusers makes NaN of it
        raise ScheduleError(f"shift_terminal {last:g} needs two steps or more, and to be below 1; {_WAY_OUT}")
    return 1.0 - (1.0 - sigma) * (1.0 - last) / (1.0 - sigma[-1])


def _of_trained_steps(total: int, trained: int, steps: int) -> StepPlan:
    """Evenly spaced among those that a consistency model was trained with: k, 2k, ... (k = T / trained), less one."""
    if steps > trained:
        raise PlanError(f"this model was trained with {trained} timesteps, got {steps} steps", param="steps")
    visited = np.arange(trained, 0, -1) * (total // trained) - 1
    return StepPlan(tuple(visited[np.floor(np.linspace(0, trained, steps, endpoint=False)).astype(int)].tolist()))


def plan_of_sigmas(sigma: Any, shift: float, total: int) -> StepPlan:
    """The indices, fractions included, at which a flow's table of that shift has these noise levels."""
    index = total * sigma / (shift - (shift - 1.0) * sigma) - 1.0
    return StepPlan(tuple(np.round(np.clip(index, 0.0, total - 1.0), 9).tolist()))
