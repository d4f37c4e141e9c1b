"""What the kernels' machine code does, for every specialisation that the engine uses: compiled here, without a GPU."""

import pytest

from imagine_flash.kernels import group_norm_silu, to_image, update

from .compiling import TARGETS, compile_elsewhere

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow
OFTEN = ("sm_90", "gfx942")  # compiled at every change
UPDATE = {
    "x_ptr": "*fp32",
    "uncond_ptr": "*bf16",
    "noise_ptr": "*fp32",
    "guidance_ptr": "*fp32",
    "table_ptr": "*fp32",
    "index_ptr": "*i32",
    "out_ptr": "*fp32",
    "guidance": "fp32",
    "scale": "fp32",
    "row_elements": "i32",
    "blocks_per_row": "i32",
    "index_stride": "i32",
    "table_rows": "i32",
}
NORM = {
    **{f"{name}_ptr": "*fp32" for name in ("sum", "square", "scale", "offset")},
    "eps": "fp32",
    **{name: "i32" for name in ("pixels", "splits", "tiles", "tiles_per_image")},
}


def update_case(network: str, *, cast: bool = True, guided: bool = False, fresh: bool = False, aligned: bool = True):
    unused = {"uncond_ptr": not guided, "guidance_ptr": not guided, "noise_ptr": not fresh, "next_ptr": not cast}
    constants = {name: None for name, missing in unused.items() if missing}
    signature = UPDATE | {"m_ptr": f"*{network}", "next_ptr": f"*{network}", "uncond_ptr": f"*{network}"}
    pointers = [name for name in signature if name.endswith("_ptr") and name not in (*constants, "index_ptr")]
    return {
        "module": update.__name__,
        "kernel": "update_kernel",
        "signature": signature,
        "warps": update.WARPS,
        "constants": {**constants, "BLOCK": update.BLOCK},
        "aligned": [*pointers, "row_elements"] if aligned else [],
    }


def image_case(dtype: str, *, planes: bool):
    return {
        "module": to_image.__name__,
        "kernel": "to_image_kernel",
        "warps": to_image.WARPS,
        "signature": {"x_ptr": f"*{dtype}", "out_ptr": "*u8", "image_elements": "i32", "blocks_per_image": "i32"},
        "constants": {"CHANNELS": 3, "PLANES": planes, "BLOCK": to_image.BLOCK},
        "aligned": ["x_ptr", "out_ptr", "image_elements"],
    }


def norm_case(kernel: str, dtype: str, *, channels: int):
    rows, width = group_norm_silu.tile_of(channels)
    group = channels // 32
    sizes: dict[str, object] = {"CHANNELS": channels, "WIDTH": width, "ROWS": rows}
    aligned = ["x_ptr", "sum_ptr", "square_ptr", "scale_ptr", "offset_ptr"]
    if kernel == "normalise_kernel":
        aligned, sizes = [*aligned[:1], *aligned[3:], "out_ptr"], {**sizes, "SILU": True}
    elif kernel == "statistics_kernel":
        aligned = aligned[:3]
    else:
        group_width = 1 << (group - 1).bit_length()
        sizes = {"GROUPS": 32, "GROUP_CHANNELS": group, "WIDTH": group_width, "ROWS": 2048 // group_width}
    return {
        "module": group_norm_silu.__name__,
        "kernel": kernel,
        "warps": group_norm_silu.WARPS,
        "signature": NORM | {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "bias", "out")},
        "constants": sizes,
        "aligned": aligned,
        "elements": 2048,
    }


WIDE, ANY = (1, 1), (0, 0)  # at least so many wide loads and stores
CASES = {
    "update, bf16 network": (update_case("bf16"), WIDE),
    "update, fp16 network": (update_case("fp16"), WIDE),
    "update, fp32 network": (update_case("fp32"), WIDE),
    "update, last step without a cast": (update_case("bf16", cast=False), WIDE),
    "update, guided": (update_case("bf16", guided=True), WIDE),
    "update, with fresh noise": (update_case("bf16", fresh=True), WIDE),
    "update, rows of no round length": (update_case("bf16", aligned=False), ANY),
    "to_image, channels_last bf16": (image_case("bf16", planes=False), WIDE),
    "to_image, channels_last fp32": (image_case("fp32", planes=False), WIDE),
    "to_image, NCHW bf16": (image_case("bf16", planes=True), (0, 1)),
    **{
        f"{kernel}, {channels} channels {dtype}": (norm_case(f"{kernel}_kernel", dtype, channels=channels), wide)
        for channels, dtype in ((128, "bf16"), (320, "bf16"), (512, "fp16"), (320, "fp32"))
        for kernel, wide in (("statistics", (1, 0)), ("normalise", WIDE))
    },
    "finalise, 320 channels bf16": (norm_case("finalise_kernel", "bf16", channels=320), ANY),
    "finalise, 2560 channels bf16": (norm_case("finalise_kernel", "bf16", channels=2560), ANY),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(target, marks=[pytest.mark.weekly] * (target not in OFTEN)) for target in TARGETS],
)
def facts(request):
    found = compile_elsewhere([{**case, "target": request.param} for case, _ in CASES.values()])
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_memory_is_moved_in_wide_pieces_and_nothing_spills(facts, name):
    found, (loads, stores) = facts[name], CASES[name][1]
    assert found["local_bytes"] == 0, found
    assert 0 < found["registers"] <= 255
    assert found["wide_loads"] >= loads and found["wide_stores"] >= stores, found
