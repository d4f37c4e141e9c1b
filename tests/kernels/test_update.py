"""The fused update against the float64 oracle and the closed forms; on a CPU in Triton's interpreter."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ScheduleError
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.sampler import Sampler
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.core.update import UpdateTable, reference_update, update_table
from imagine_flash.kernels.triton_or_reference import runs_kernel
from imagine_flash.kernels.update import BLOCK, coefficients_on, noise_corrected_update, reference

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SD = NoiseSchedule.from_scheduler_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
FLOW = NoiseSchedule.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
TYPES = ("epsilon", "v_prediction", "sample", "flow")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FRESH = Sampler(kind="renoise")
SHAPES = {
    "one element": (1, 1),
    "no power of two": (2, 1023),
    "prime": (3, 1, 1, 2053),
    "a latent of 512x512, batch 2": (2, 4, 64, 64),
    "tokens": (2, 77, 16),
    "batch 7": (7, 4, 8, 8),
}


def schedule_of(prediction_type):
    return FLOW if prediction_type == "flow" else SD


def table_of(prediction_type: str = "v_prediction", steps: int = 3, **options: Any):
    return update_table(schedule_of(prediction_type), StepPlan.trailing(steps), prediction_type, **options)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_as_good_as_torch(found, oracle, same_in_torch):
    """STYLE's rule: at most twice the error of the same maths in torch at that dtype, plus a small absolute one."""
    error = (found.double() - oracle).abs().max()
    allowed = 2 * (same_in_torch.double() - oracle).abs().max() + 1e-6
    assert error <= allowed, f"{error:.3g} > {allowed:.3g}"


def test_the_kernel_is_what_runs_here():
    assert runs_kernel(torch.zeros(1, device=DEVICE)), "these tests would compare the reference with itself"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fresh", "noise_correction"), [("none", True), ("none", False), ("given", None)])
@pytest.mark.parametrize("guided", ["no", "number", "per image"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_every_combination(prediction_type, noise_correction, guided, fresh, dtype):
    shape = (3, 4, 5, 7)
    options: dict[str, Any] = {"sampler": FRESH} if fresh != "none" else {"noise_correction": noise_correction}
    coefficients = coefficients_on(DEVICE, table_of(prediction_type, **options))
    x, m = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    given = {}
    if guided != "no":
        given["uncond"] = draw(*shape, dtype=dtype, seed=2)
        given["guidance"] = 2.5 if guided == "number" else torch.tensor([1.0, 2.5, 7.0], device=DEVICE)
    if fresh == "given":
        given["noise"] = draw(*shape, dtype=dtype, seed=3)
    index = [2, 0, 1]
    found = noise_corrected_update(x, m, coefficients, index, **given)
    assert found.dtype == torch.float32 and found.shape == x.shape
    rows = torch.tensor(index, device=DEVICE)
    oracle = reference(x, m, coefficients.rows.double(), rows, dtype=torch.float64, **given)
    assert_as_good_as_torch(found, oracle, reference(x, m, coefficients.rows, rows, dtype=dtype, **given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_and_the_cast_for_the_next_call(shape, dtype):
    table = table_of()
    coefficients = coefficients_on(DEVICE, table)
    x, m = draw(*shape), draw(*shape, dtype=dtype, seed=1)
    index = [i % 3 for i in range(shape[0])]
    state, following = torch.full_like(x, torch.nan), torch.full_like(m, torch.nan)
    returned = noise_corrected_update(x, m, coefficients, index, out=state, network_input=following, scale=0.5)
    assert returned is state
    oracle = reference_update(x.cpu().double().numpy(), m.cpu().double().numpy(), table, index)
    np.testing.assert_allclose(state.cpu().double(), oracle, rtol=0, atol=2e-6)
    error = (following.double().cpu() - 0.5 * torch.from_numpy(oracle)).abs()
    ulps = 0.5 if DEVICE == "cuda" or dtype != torch.bfloat16 else 1.0  # the interpreter cuts bfloat16 off
    assert (error <= ulps * ULP[dtype] * (0.5 * torch.from_numpy(oracle)).abs() + 2e-6).all()


def test_a_step_for_all_images_is_that_step_for_each():
    coefficients = coefficients_on(DEVICE, table_of())
    x, m = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1)
    for i in range(3):
        one, each = (noise_corrected_update(x, m, coefficients, index) for index in (i, [i] * 3))
        assert torch.equal(one, each)


def test_rows_of_one_batch_may_follow_different_plans():
    """Image i is updated as it would be by itself, with the table of its own plan."""
    tables = [table_of(steps=n) for n in (1, 2, 3)]
    coefficients = coefficients_on(DEVICE, *tables)
    assert coefficients.starts == (0, 1, 3)
    x, m = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1)
    index = [coefficients.starts[0], coefficients.starts[1] + 1, coefficients.starts[2] + 1]
    together = noise_corrected_update(x, m, coefficients, index)
    for i, (table, step) in enumerate(zip(tables, (0, 1, 1), strict=True)):
        alone = noise_corrected_update(x[i : i + 1], m[i : i + 1], coefficients_on(DEVICE, table), step)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize(
    "strided",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["channels_last", "gaps, 4x128x128", "transposed"],
)
def test_layouts_do_not_change_the_result(strided):
    coefficients = coefficients_on(DEVICE, table_of())
    x, m = draw(2, 4, 128, 128), draw(2, 4, 128, 128, seed=1)
    plain = noise_corrected_update(x, m, coefficients, [0, 2])
    assert torch.equal(noise_corrected_update(strided(x), strided(m), coefficients, [0, 2]), plain)
    assert torch.equal(noise_corrected_update(x, strided(m), coefficients, [0, 2]), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    coefficients = coefficients_on(DEVICE, table_of())
    x, m = draw(2, BLOCK + 3, dtype=dtype), draw(2, BLOCK + 3, dtype=dtype, seed=1)
    apart = noise_corrected_update(x, m, coefficients, [0, 1], out=torch.empty_like(x))
    assert noise_corrected_update(x, m, coefficients, [0, 1], out=x) is x
    assert torch.equal(x, apart)


def test_an_empty_batch_is_no_launch():
    x = torch.empty(0, 4, 8, 8, device=DEVICE)
    assert noise_corrected_update(x, x, coefficients_on(DEVICE, table_of()), []).shape == x.shape


@pytest.mark.parametrize(("prediction_type", "steps"), list(itertools.product(TYPES, (1, 2, 3))))
def test_a_point_mass_is_reached(prediction_type, steps):
    """DESIGN's closed form: every prediction type lands on the point, by any plan, through the kernel."""
    schedule, table = schedule_of(prediction_type), table_of(prediction_type, steps)
    coefficients, point = coefficients_on(DEVICE, table), draw(1, 4, 8, 8, seed=1)
    x = draw(2, 4, 8, 8)
    for i, t in enumerate(table.timesteps):
        alpha, sigma = (float(v) for v in schedule.at(t))
        eps = (x - alpha * point) / sigma
        m = {"epsilon": eps, "v_prediction": alpha * eps - sigma * point, "sample": point, "flow": eps - point}
        x = noise_corrected_update(x, m[prediction_type].expand_as(x), coefficients, i)
    assert (x - point).abs().max() < (2e-4 if prediction_type == "epsilon" else 5e-6)  # epsilon divides by alpha_T


def test_noise_correction_changes_the_first_step_by_its_closed_form():
    """On Stable Diffusion's schedule by sigma_s [alpha_T x0 - (1 - sigma_T) x_T] / sigma_T; at one step by nothing."""
    for steps in (1, 2, 3):
        tables = [table_of("v_prediction", steps, noise_correction=on) for on in (False, True)]
        x, m = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1)
        predicted, true = (noise_corrected_update(x, m, coefficients_on(DEVICE, table), 0) for table in tables)
        times = tables[0].timesteps
        alpha_T, sigma_T = (float(v) for v in SD.at(int(times[0])))
        sigma_s = float(SD.at(int(times[1]))[1]) if steps > 1 else 0.0
        x0 = alpha_T * x - sigma_T * m
        change = sigma_s * (alpha_T * x0 - (1 - sigma_T) * x) / sigma_T
        torch.testing.assert_close(true - predicted, change, rtol=0, atol=2e-6)


def test_a_three_step_plan_equals_the_reference_loop():
    """A network that depends on its input: errors would add up over the steps."""
    table = table_of()
    coefficients = coefficients_on(DEVICE, table)
    x = draw(2, 4, 16, 16)
    expected = x.cpu().double().numpy()
    for i in range(3):
        x = noise_corrected_update(x, torch.tanh(x), coefficients, i, out=x)
        expected = reference_update(expected, np.tanh(expected), table, i)
    np.testing.assert_allclose(x.cpu().double(), expected, rtol=0, atol=5e-6)


X, TABLE = torch.zeros(2, 4, 8, 8, device=DEVICE), coefficients_on(DEVICE, table_of())
RENOISING = coefficients_on(DEVICE, table_of(sampler=FRESH))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"m": X[:1]}, r"m has shape \(1, 4, 8, 8\), x has \(2, 4, 8, 8\)"),
        ({"uncond": X[:, :1], "guidance": 2.0}, r"uncond has shape \(2, 1, 8, 8\), x has \(2, 4, 8, 8\)"),
        ({"out": X[..., :4]}, r"out has shape \(2, 4, 8, 4\), x has \(2, 4, 8, 8\)"),
        ({"m": X.double()}, "m has dtype torch.float64; known: float32, float16, bfloat16"),
        ({"m": X.to("meta")}, "m is on meta, x is on"),
        ({"step_index": 3}, r"step_index 3 is outside the table's rows 0\.\.2"),
        ({"step_index": [0, -1]}, "step_index -1 is outside"),
        ({"step_index": [0, 1, 2]}, "step_index has 3 values, x has 2 images"),
        ({"uncond": X}, "guidance needs both uncond and guidance"),
        ({"guidance": 2.0}, "guidance needs both uncond and guidance"),
        (
            {"uncond": X, "guidance": torch.ones(3, device=DEVICE)},
            r"guidance must be float32 \(2,\) on .*, got float32 \(3,\)",
        ),
        ({"coefficients": RENOISING}, "this table re-noises: give noise of the shape of x"),
        ({"out": torch.zeros(2, 4, 8, 16, device=DEVICE)[..., ::2]}, r"out has strides .* must be contiguous"),
        (
            {"out": X, "network_input": X.contiguous(memory_format=torch.channels_last)},
            "network_input has strides .* must have the layout of out",
        ),
    ],
)
def test_bad_input_is_refused_before_a_launch(given, message):
    arguments = {"x": X, "m": X, "coefficients": TABLE, "step_index": 0, **given}
    with pytest.raises(ValueError, match=message):
        noise_corrected_update(**arguments)


def test_a_table_without_a_closed_form_is_refused():
    broken = UpdateTable(np.array([1.0, np.nan]), np.zeros(2), np.zeros(2), np.array([999, 499]))
    with pytest.raises(ScheduleError, match=r"row 1 of the update table is \[nan, 0.0, 0.0\]: this step has no closed"):
        coefficients_on(DEVICE, broken)
    with pytest.raises(ScheduleError, match="no update table given"):
        coefficients_on(DEVICE)


def test_more_rows_than_a_grid_holds_are_refused():
    from imagine_flash.kernels.triton_or_reference import programs

    assert programs(2**31 - 1, 1024, 1024) == 2**31 - 1
    with pytest.raises(ValueError, match="2147483648 rows of 1 elements need 2147483648 programs"):
        programs(2**31, 1, 1024)


def test_an_index_that_the_host_does_not_see_gives_nan():
    """On a GPU the indices stay there: a wrong one must not pick another step."""
    from imagine_flash.kernels.update import run

    index, out = torch.tensor([1, 3], device=DEVICE), torch.zeros_like(X)
    run(X, X, TABLE.rows, index, out, None, None, 0.0, None, None, 1.0)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_the_op_is_well_formed():
    """torch's own check: the schema, the fake implementation, and what torch.compile makes of it."""
    from imagine_flash.kernels.update import update_op

    x = draw(2, 4, 8, 8)
    arguments = (x, x * 2, TABLE.rows, TABLE.positions[:1], torch.empty_like(x), None, None, 0.0, None, None, 1.0)
    torch.library.opcheck(update_op, arguments)


def test_torch_compile_traces_the_call_without_a_break():
    """The host's checks and the op go into one graph; the backend that runs it is tested on a GPU."""
    x, m = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1)

    def step(x, m):
        following = torch.empty_like(m)
        x_s = noise_corrected_update(x, m * 2, TABLE, 1, network_input=following, scale=0.5)
        return x_s, following + 1

    for compiled, eager in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(x, m), step(x, m), strict=True):
        assert torch.equal(compiled, eager)
