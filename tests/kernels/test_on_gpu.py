"""What only hardware can show: rounding, CUDA graphs, torch.compile on the device, streams, outputs that nothing else wrote."""

import pytest
import torch

from imagine_flash.benchmarks.kernels import captured
from imagine_flash.core.plan import StepPlan
from imagine_flash.core.schedule import NoiseSchedule
from imagine_flash.core.update import update_table
from imagine_flash.kernels.group_norm_silu import group_norm_silu
from imagine_flash.kernels.group_norm_silu import reference as norm_reference
from imagine_flash.kernels.to_image import reference as image_reference
from imagine_flash.kernels.to_image import to_image
from imagine_flash.kernels.update import Coefficients, coefficients_on, noise_corrected_update

pytestmark = pytest.mark.gpu
SD = NoiseSchedule.from_scheduler_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


@pytest.fixture
def table() -> Coefficients:
    return coefficients_on("cuda", update_table(SD, StepPlan.trailing(3), "v_prediction"))


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_cast_is_rounded_to_nearest(table, dtype):
    x, m = draw(2, 4, 64, 64), draw(2, 4, 64, 64, dtype=dtype, seed=1)
    following = torch.full_like(m, torch.nan)
    x_s = noise_corrected_update(x, m, table, [0, 1], network_input=following)
    assert torch.equal(following, x_s.to(dtype))


@pytest.mark.parametrize("guided", [False, True])
def test_rows_beyond_two_billion_values_are_found(table, guided):
    """int64 offsets: the last row starts beyond what 32 bits can count."""
    rows, width = 2**15 + 3, 2**16
    x = torch.zeros(rows, width, device="cuda", dtype=torch.float16)
    x[-1] = 1.0
    options = {"uncond": x, "guidance": 2.0} if guided else {}
    out = noise_corrected_update(x, x, table, 1, out=x, **options)
    a, b, _ = table.rows[1].tolist()
    torch.testing.assert_close(out[-1].float(), torch.full((width,), a + b, device="cuda"), rtol=1e-3, atol=1e-3)
    assert out[:-1].abs().max() == 0


def test_a_captured_plan_replays_on_new_noise(table):
    """The loop of three updates in one CUDA graph equals the loop outside it, for inputs written after the capture."""
    x, state, following = (
        draw(2, 4, 64, 64),
        torch.empty(2, 4, 64, 64, device="cuda"),
        draw(2, 4, 64, 64, dtype=torch.bfloat16),
    )

    def loop() -> None:
        state.copy_(x)
        for i in range(3):
            noise_corrected_update(state, following, table, i, out=state, network_input=following)

    start = following.clone()
    replay = captured(loop)
    x.copy_(draw(2, 4, 64, 64, seed=5))
    following.copy_(start)
    loop()
    expected = state.clone()
    following.copy_(start)
    state.fill_(torch.nan)
    replay()
    assert torch.equal(state, expected)


def test_torch_compile_takes_the_ops(table):
    def step(x, m):
        x_s = noise_corrected_update(x, m * 1.0, table, 1)
        return to_image(group_norm_silu(x_s[:, :3].contiguous(), 3) * 2 - 1)

    x, m = draw(2, 4, 32, 32), draw(2, 4, 32, 32, seed=1)
    difference = torch.compile(step, fullgraph=True)(x, m).int() - step(x, m).int()
    assert difference.abs().max() <= 1


def test_a_side_stream_is_used(table):
    x, m = draw(8, 4, 128, 128), draw(8, 4, 128, 128, seed=1)
    expected = noise_corrected_update(x, m, table, 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = m + 0  # ready on this stream only
        found = noise_corrected_update(x, late, table, 1)
    side.synchronize()
    assert torch.equal(found, expected)


def test_poisoned_outputs_are_written_whole(table):
    for shape in ((1, 1), (3, 2053), (2, 4, 64, 64)):
        x, m = draw(*shape), draw(*shape, seed=1)
        out, following = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan, dtype=torch.bfloat16)
        noise_corrected_update(x, m, table, 1, out=out, network_input=following)
        assert out.isfinite().all() and following.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decoder_kernels_at_full_size(dtype, layout):
    x = draw(1, 128, 512, 512, dtype=dtype).contiguous(memory_format=layout)
    weight, bias = draw(128, dtype=dtype, seed=1), draw(128, dtype=dtype, seed=2)
    oracle = norm_reference(x.double(), 32, weight.double(), bias.double(), 1e-6, True)
    error = (group_norm_silu(x, 32, weight, bias, eps=1e-6).double() - oracle).abs().max()
    allowed = 2 * (norm_reference(x, 32, weight, bias, 1e-6, True).double() - oracle).abs().max() + 1e-6
    assert error <= allowed
    levels = (to_image(x[:, :3]).int() - image_reference(x[:, :3]).int()).abs()
    assert levels.max() <= 1 and levels.float().mean() < 1e-3  # the kernel's multiply-add rounds once
