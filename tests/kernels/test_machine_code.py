"""What the kernels' machine code does, for every specialisation that the engine uses: compiled here, without a GPU."""

import pytest

from imagine_flash.kernels import group_norm_silu, to_image, update

from .compiling import TARGETS, compile_elsewhere

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow
UPDATE = {
    "x_ptr": "*fp32",
    "uncond_ptr": "*bf16",
    "noise_ptr": "*fp32",
    "seed_ptr": "*i64",
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
    "channels": "i32",
}
NORM = {"partial_ptr": "*fp32", "eps": "fp32", "channels": "i32", "pixels": "i32", "chunks": "i32"}


def update_case(network: str, *, cast: bool = True, guided: bool = False, seeded: bool = False, aligned: bool = True):
    unused = {
        "uncond_ptr": not guided,
        "guidance_ptr": not guided,
        "noise_ptr": True,
        "seed_ptr": not seeded,
        "next_ptr": not cast,
    }
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


def norm_case(kernel: str, dtype: str, *, planes: bool, channels: int):
    chunks, width, block = group_norm_silu.chunks_of(channels, 64 * 64, 32, planes)
    sizes = {"GROUPS": 32, "GROUP_CHANNELS": channels // 32, "WIDTH": width, "PLANES": planes, "BLOCK": block}
    aligned = ["x_ptr", "channels", "pixels"]
    if kernel == "normalise_kernel":
        aligned.append("out_ptr")
        sizes |= {"SILU": True, "CHUNKS": 1 << (chunks - 1).bit_length()}
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "bias", "out")}
    return {
        "module": group_norm_silu.__name__,
        "kernel": kernel,
        "warps": group_norm_silu.WARPS,
        "signature": NORM | pointers,
        "constants": sizes,
        "aligned": aligned,
    }


WIDE, ANY = (1, 1), (0, 0)  # at least so many wide loads and stores
COSINE = (
    32  # bytes: a table in CUDA's cosf for arguments far outside the circle, which are never asked for; not a spill
)
CASES = {
    "update, bf16 network": (update_case("bf16"), WIDE),
    "update, fp16 network": (update_case("fp16"), WIDE),
    "update, fp32 network": (update_case("fp32"), WIDE),
    "update, last step without a cast": (update_case("bf16", cast=False), WIDE),
    "update, guided": (update_case("bf16", guided=True), WIDE),
    "update, noise from seeds": (update_case("bf16", seeded=True), WIDE),
    "update, rows of no round length": (update_case("bf16", aligned=False), ANY),
    "to_image, channels_last bf16": (image_case("bf16", planes=False), WIDE),
    "to_image, channels_last fp32": (image_case("fp32", planes=False), WIDE),
    "to_image, NCHW bf16": (image_case("bf16", planes=True), (0, 1)),
    "statistics, NCHW bf16": (norm_case("statistics_kernel", "bf16", planes=True, channels=320), (1, 0)),
    "statistics, channels_last bf16": (norm_case("statistics_kernel", "bf16", planes=False, channels=512), (1, 0)),
    "normalise, NCHW bf16": (norm_case("normalise_kernel", "bf16", planes=True, channels=320), WIDE),
    "normalise, channels_last bf16": (norm_case("normalise_kernel", "bf16", planes=False, channels=512), WIDE),
    "normalise, channels_last, ten channels": (norm_case("normalise_kernel", "bf16", planes=False, channels=320), ANY),
}


@pytest.fixture(scope="module")
def facts():
    names = [(name, target) for name in CASES for target in TARGETS]
    found = compile_elsewhere([{**CASES[name][0], "target": target} for name, target in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_memory_is_moved_in_wide_pieces_and_nothing_spills(facts, name, target):
    found, (loads, stores) = facts[name, target], CASES[name][1]
    assert found["local_bytes"] in ((0, COSINE) if "seeds" in name else (0,)), found
    assert 0 < found["registers"] <= 255
    assert found["wide_loads"] >= loads and found["wide_stores"] >= stores, found
