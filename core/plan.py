"""Which timesteps a few-step student visits."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np

from .errors import PlanError

DEFAULT_STEPS = (1, 2, 3)


@dataclass(frozen=True)
class StepPlan:
    """Timestep indices in the order they are visited, strictly decreasing, all >= 0; fractions lie between two entries of
    the schedule. Raises PlanError."""

    timesteps: tuple[float, ...]  # ints where they are whole

    def __post_init__(self) -> None:
        try:
            raw = tuple(self.timesteps)
        except TypeError:
            raise PlanError(f"a plan is a list of timesteps, got {self.timesteps!r}") from None
        if not raw:
            raise PlanError("a plan needs at least one timestep, such as [999]")
        for t in raw:
            known = isinstance(t, int | float | np.integer | np.floating) and not isinstance(t, bool)
            if not known or not 0 <= t < math.inf:
                raise PlanError(f"a timestep must be a number >= 0, got {t!r}")
        if any(now <= following for now, following in pairwise(raw)):
            raise PlanError(f"timesteps must decrease strictly, got {list(raw)}; write the noisiest first")
        object.__setattr__(self, "timesteps", tuple(int(t) if t == int(t) else float(t) for t in raw))

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[float]:
        return iter(self.timesteps)

    @classmethod
    def trailing(cls, steps: int, num_train_timesteps: int = 1000) -> "StepPlan":
        """t_i = floor((T - 1)(n - i) / n), i = 0..n-1: 1 -> (999,), 2 -> (999, 499), 3 -> (999, 666, 333)."""
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < num_train_timesteps:
            raise PlanError(f"a plan has between 1 and {num_train_timesteps - 1} steps, got {steps!r}")
        return cls(tuple((num_train_timesteps - 1) * (steps - i) // steps for i in range(steps)))


def plans_by_steps(
    plans: Mapping[int, Sequence[float] | StepPlan] | None = None, num_train_timesteps: int = 1000
) -> dict[int, StepPlan]:
    """The plans keyed by their number of steps, in increasing order; None means trailing plans of 1, 2 and 3 steps.

    Keys may be the strings that JSON and YAML make of numbers. Raises PlanError.
    """
    if plans is None:
        return {n: StepPlan.trailing(n, num_train_timesteps) for n in DEFAULT_STEPS}
    if not plans:
        raise PlanError("a model needs at least one plan, such as {1: [999]}")
    built: dict[int, StepPlan] = {}
    for key, timesteps in plans.items():
        plan = timesteps if isinstance(timesteps, StepPlan) else StepPlan(cast(tuple[float, ...], timesteps))
        if str(key) != str(len(plan)):
            raise PlanError(f"the plan for {key} steps visits {len(plan)} timesteps: {list(plan)}")
        if plan.timesteps[0] > num_train_timesteps - 1:
            raise PlanError(f"timestep {plan.timesteps[0]} is outside the schedule's 0..{num_train_timesteps - 1}")
        built[len(plan)] = plan
    return dict(sorted(built.items()))


def select(plans: Mapping[int, StepPlan], steps: object) -> StepPlan:
    """The plan of `steps` steps. Raises PlanError that lists the plans there are."""
    if isinstance(steps, int) and not isinstance(steps, bool) and steps in plans:
        return plans[steps]
    known = [str(n) for n in sorted(plans)]
    spoken = " or ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
    known_for = f"this model was distilled for {', '.join(known)}"
    raise PlanError(f"steps must be {spoken}, got {steps}; {known_for}", param="steps")
