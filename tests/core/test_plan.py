"""Plans: trailing spacing, and every wrong plan."""

import numpy as np
import pytest

from imagine_flash.core.errors import PlanError
from imagine_flash.core.plan import StepPlan, plans_by_steps, select


@pytest.mark.parametrize(
    ("steps", "timesteps"), [(1, (999,)), (2, (999, 499)), (3, (999, 666, 333)), (4, (999, 749, 499, 249))]
)
def test_trailing_plans(steps, timesteps):
    plan = StepPlan.trailing(steps)
    assert plan.timesteps == tuple(plan) == timesteps
    assert len(plan) == steps


def test_trailing_plans_of_another_length_start_at_the_end_and_stay_positive():
    assert StepPlan.trailing(3, 10).timesteps == (9, 6, 3)
    assert StepPlan.trailing(999, 1000).timesteps == tuple(range(999, 0, -1))


def test_whole_timesteps_become_ints_and_fractions_stay():
    assert all(type(t) is int for t in StepPlan(tuple(np.array([9, 3]))))
    assert [type(t) for t in StepPlan((999.0, 333.5))] == [int, float]


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((), "at least one timestep"),
        ((499, 999), "must decrease strictly, got [499, 999]"),
        ((999, 999), "must decrease strictly"),
        ((999, -1), "a number >= 0, got -1"),
        ((float("inf"), 5), "a number >= 0, got inf"),
        ((999, float("nan")), "a number >= 0, got nan"),
        ((True,), "got True"),
        (("999",), "got '999'"),
        (999, "a list of timesteps, got 999"),
        (None, "a list of timesteps, got None"),
    ],
)
def test_bad_plans(timesteps, message):
    with pytest.raises(PlanError) as caught:
        StepPlan(timesteps)
    assert message in str(caught.value)


@pytest.mark.parametrize("steps", [0, -1, 1000, True, "two", 1.0])
def test_trailing_refuses(steps):
    with pytest.raises(PlanError, match="between 1 and 999 steps"):
        StepPlan.trailing(steps)


def test_plans_by_steps():
    assert {n: plan.timesteps for n, plan in plans_by_steps().items()} == {1: (999,), 2: (999, 499), 3: (999, 666, 333)}
    from_json = plans_by_steps({"2": [999, 400], 1: StepPlan((999,))})  # type: ignore[dict-item]
    assert list(from_json) == [1, 2]
    assert from_json[2].timesteps == (999, 400)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({}, "at least one plan"),
        ({2: [999]}, "the plan for 2 steps visits 1 timesteps: [999]"),
        ({"two": [999, 499]}, "the plan for two steps"),
        ({1: [1000]}, "timestep 1000 is outside the schedule's 0..999"),
        ({1: 999}, "a list of timesteps, got 999"),
    ],
)
def test_bad_plan_tables(plans, message):
    with pytest.raises(PlanError) as caught:
        plans_by_steps(plans)
    assert message in str(caught.value)


@pytest.mark.parametrize("steps", [0, 4, -1, "two", None, True, 1.5])
def test_select_lists_what_there_is(steps):
    with pytest.raises(PlanError) as caught:
        select(plans_by_steps(), steps)
    assert str(caught.value) == f"steps must be 1, 2 or 3, got {steps}; this model was distilled for 1, 2, 3"


def test_select():
    assert select(plans_by_steps(), 2).timesteps == (999, 499)
    with pytest.raises(PlanError, match="steps must be 2, got 3; this model was distilled for 2"):
        select(plans_by_steps({2: [999, 499]}), 3)
