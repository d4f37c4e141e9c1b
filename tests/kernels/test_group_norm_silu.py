"""GroupNorm + SiLU against torch in float64, and inside diffusers' own blocks."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from imagine_flash.kernels.group_norm_silu import (
    FusedGroupNorm,
    FusedGroupNormSiLU,
    apply,
    group_norm_op,
    group_norm_silu,
    has_channels_last,
    reference,
    restore,
    splits_of,
    tile_of,
)
from imagine_flash.kernels.triton_or_reference import runs_kernel

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = {  # shape, groups
    "one value a group": ((2, 4, 1, 1), 4),
    "prime": ((1, 6, 31, 37), 2),
    "ten channels a group": ((2, 40, 8, 8), 4),
    "several chunks": ((1, 8, 64, 64), 2),
    "batch 7": ((7, 32, 4, 4), 16),
    "one group, as LayerNorm": ((2, 12, 9, 5), 1),
    "tokens": ((2, 16, 77), 4),
}


def draw(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3).to(DEVICE, dtype)


def test_the_kernel_is_what_runs_here():
    assert runs_kernel(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES.keys())
def test_as_good_as_torch(shape, groups, dtype, channels_last, silu):
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    x = draw(*shape, dtype=dtype).contiguous(memory_format=layout)
    weight, bias = draw(shape[1], dtype=dtype, seed=1), draw(shape[1], dtype=dtype, seed=2)
    found = group_norm_silu(x, groups, weight, bias, silu=silu)
    assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
    oracle = reference(x.double(), groups, weight.double(), bias.double(), 1e-5, silu)
    error = (found.double() - oracle).abs().max()
    allowed = 2 * (reference(x, groups, weight, bias, 1e-5, silu).double() - oracle).abs().max() + 1e-6
    folded = x.double().flatten(2).std(2, False).square().add(1e-5).rsqrt().amax() * x.abs().max() * weight.abs().max()
    allowed = allowed + 2**-23 * folded.double()  # x scale + offset is rounded where x is large beside its deviation
    if dtype is torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts bfloat16 off: one unit in the last place
        allowed = max(allowed, 2**-7 * oracle.abs().max())
    assert error <= allowed, f"{error:.3g} > {allowed:.3g}"


def test_without_weights_and_with_another_layout():
    x = draw(2, 8, 6, 10)[..., ::2]
    found = group_norm_silu(x, 4)
    torch.testing.assert_close(found, reference(x, 4, None, None, 1e-5, True), rtol=1e-5, atol=1e-5)


def test_a_large_mean_does_not_cancel():
    """The mean of squares minus the square of the mean loses everything here; squares around the mean do not."""
    x = (1e4 + draw(1, 4, 64, 64)).contiguous(memory_format=torch.channels_last)
    oracle = reference(x.double(), 1, None, None, 1e-5, False)
    assert (group_norm_silu(x, 1, silu=False).double() - oracle).abs().max() < 5e-3


CHANNELS = (128, 256, 320, 512, 640, 960, 1280, 1920, 2560)  # of the UNets and decoders of Stable Diffusion and SDXL


@pytest.mark.parametrize("channels", [*CHANNELS, 1, 6, 40, 4096])
@pytest.mark.parametrize("pixels", [1, 64, 77, 128 * 128, 1024 * 1024])
@pytest.mark.parametrize("batch", [1, 16])
def test_tiles_cover_an_image_and_stay_small(batch, channels, pixels):
    """A block that doubled without limit spilled 65,536 registers at 1024x1024, and was refused beyond."""
    rows, width = tile_of(channels)
    assert rows * width == 2048 and rows & (rows - 1) == 0 and -(-channels // width) * width >= channels
    if channels in CHANNELS:
        assert channels % width == 0 and width >= 64, "every lane has a value, and a row is a whole cache line"
    splits, tiles = splits_of(batch, channels, pixels)
    assert (splits - 1) * tiles * rows < pixels <= splits * tiles * rows
    assert splits == 1 or batch * -(-channels // width) * splits <= 2 * 1024


def test_the_tokens_of_an_attention_are_channels_last():
    """The decoder's attention hands over (B, C, H W), a view of (B, H W, C)."""
    tokens = draw(2, 77, 16).transpose(1, 2)
    assert has_channels_last(tokens) and not has_channels_last(tokens.contiguous())
    found = group_norm_silu(tokens, 4, silu=False)
    assert found.stride() == tokens.stride()
    torch.testing.assert_close(found, reference(tokens, 4, None, None, 1e-5, False), rtol=1e-5, atol=1e-5)


def tiny_unet() -> Any:
    torch.manual_seed(0)
    build: Any = UNet2DConditionModel
    return (
        build(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        .to(DEVICE)
        .eval()
    )


def tiny_decoder() -> Any:
    torch.manual_seed(0)
    build: Any = AutoencoderKL
    return (
        build(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            latent_channels=4,
        )
        .to(DEVICE)
        .eval()
    )


def run(model, x):
    with torch.no_grad():
        if isinstance(model, UNet2DConditionModel):
            return model(x, torch.tensor([5, 900], device=DEVICE), draw(2, 7, 16, seed=3)).sample
        return model.decode(x).sample


@pytest.mark.parametrize("build", [tiny_unet, tiny_decoder])
def test_diffusers_models_draw_the_same_and_keep_their_state(build, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = build(), draw(2, 4, 8, 8)
    norms = sum(isinstance(part, nn.GroupNorm) for part in model.modules())
    before, state = run(model, x), copy.deepcopy(model.state_dict())
    assert apply(model) == norms > 5
    assert any(type(part) is FusedGroupNormSiLU for part in model.modules())
    assert any(type(part) is FusedGroupNorm for part in model.modules()), "the norm of an attention has no SiLU"
    torch.testing.assert_close(run(model, x), before, rtol=2e-5, atol=2e-5)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    other = build()
    other.load_state_dict(model.state_dict())
    assert apply(model) == 0, "a second time there is nothing left to do"
    assert restore(model) == norms
    assert torch.equal(run(model, x), before)
    assert not any(isinstance(part, FusedGroupNorm) for part in model.modules())


def test_training_goes_through_torch():
    norm = nn.GroupNorm(2, 4, device=DEVICE)
    apply(norm)
    assert isinstance(norm, FusedGroupNorm)
    norm(draw(1, 4, 3, 3)).sum().backward()
    assert norm.bias.grad is not None and norm.bias.grad.eq(9).all()


def test_a_block_that_scales_between_norm_and_silu_is_left_alone():
    from diffusers.models.resnet import ResnetBlock2D

    block = (
        ResnetBlock2D(in_channels=8, temb_channels=16, groups=4, time_embedding_norm="scale_shift").to(DEVICE).eval()
    )
    x, time = draw(2, 8, 4, 4), draw(2, 16, seed=1)
    with torch.no_grad():
        before = block(x, time)
        assert apply(block) == 2
        assert type(block.nonlinearity) is nn.SiLU
        torch.testing.assert_close(block(x, time), before, rtol=2e-5, atol=2e-5)


X = torch.zeros(2, 8, 4, 4, device=DEVICE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.long(), 4), "x must be float32, float16 or bfloat16"),
        ((X[0, 0, 0], 1), r"x must be .* \(B, C, ...\), got torch.float32 \(4,\)"),
        ((X, 3), "8 channels do not divide into 3 groups"),
        ((X, 0), "8 channels do not divide into 0 groups"),
        ((X, 4, X[0, :, 0, 0]), "give weight and bias, or neither"),
        ((X, 4, X[0, :4, 0, 0], X[0, :, 0, 0]), r"weight must be \(8,\) on .*, got \(4,\)"),
    ],
)
def test_bad_input_is_refused_before_a_launch(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(*arguments)


def test_an_empty_batch_is_no_launch():
    assert group_norm_silu(X[:0], 4).shape == (0, 8, 4, 4)


def test_the_op_is_well_formed():
    weight = draw(8)
    torch.library.opcheck(group_norm_op, (draw(2, 8, 4, 4), 4, weight, weight, 1e-5, True))
