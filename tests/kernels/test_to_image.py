"""Pixels: every level and every tie is what torch makes of it, in both layouts."""

import pytest
import torch

from imagine_flash.kernels.to_image import reference, to_image, to_image_op
from imagine_flash.kernels.triton_or_reference import runs_kernel

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = {
    "one pixel": (1, 3, 1, 1),
    "prime": (2, 3, 31, 37),
    "64x64": (2, 3, 64, 64),
    "four channels": (1, 4, 9, 7),
    "batch 7": (7, 3, 8, 8),
}


def draw(*shape, dtype=torch.float32):
    return (1.2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)


def test_the_kernel_is_what_runs_here():
    assert runs_kernel(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equal_to_torch_bit_by_bit(shape, dtype, layout):
    x = draw(*shape, dtype=dtype).contiguous(memory_format=layout)
    poisoned = torch.full((shape[0], shape[2], shape[3], shape[1]), 77, dtype=torch.uint8, device=DEVICE)
    found = to_image(x, out=poisoned)
    assert found is poisoned
    expected = (x.double() * 127.5 + 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1)
    wrong = found != expected
    assert (found.int() - expected.int()).abs().max() <= 1 and wrong.float().mean() < 1e-3  # float32 ties
    assert torch.equal(found, reference(x))


def test_a_layout_with_gaps_is_copied():
    x = draw(2, 3, 8, 16)[..., ::2]
    assert torch.equal(to_image(x), reference(x))


def test_every_level_is_reached_and_what_is_outside_is_cut():
    levels = torch.arange(256, device=DEVICE, dtype=torch.float32).view(1, 1, 16, 16)
    assert torch.equal(to_image((levels - 127.5) / 127.5).flatten().float(), levels.flatten())
    x = torch.tensor([-torch.inf, -2.0, 2.0, torch.inf, torch.nan], device=DEVICE).view(1, 1, 1, 5)
    assert to_image(x).flatten().tolist() == [0, 0, 255, 255, 0]


def test_an_empty_batch_is_no_launch():
    assert to_image(torch.empty(0, 3, 8, 8, device=DEVICE)).shape == (0, 8, 8, 3)


X = torch.zeros(2, 3, 8, 8, device=DEVICE)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (X[0], None, r"x must be float32, float16 or bfloat16 \(B, C, H, W\), got torch.float32 \(3, 8, 8\)"),
        (X.byte(), None, "x must be float32, float16 or bfloat16"),
        (X, X.byte(), r"out has shape \(2, 3, 8, 8\), x of \(2, 3, 8, 8\) needs \(2, 8, 8, 3\)"),
        (X, X.view(2, 8, 8, 3), "out must be contiguous uint8"),
        (X, X.byte().permute(0, 2, 3, 1), "out must be contiguous uint8"),
    ],
)
def test_bad_input_is_refused_before_a_launch(x, out, message):
    with pytest.raises(ValueError, match=message):
        to_image(x, out=out)


def test_the_op_is_well_formed():
    torch.library.opcheck(to_image_op, (draw(2, 3, 8, 8), torch.empty(2, 8, 8, 3, dtype=torch.uint8, device=DEVICE)))
