"""Compiles kernels to machine code on a machine without a GPU, and reports what the code does to memory.

Run as a program, since the interpreter that the other tests use is chosen when Triton is imported:
`python -m imagine_flash.tests.kernels.compiling < cases.json > facts.json`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
_WIDE = {
    "nvidia": (r"\bLDG\.E[.\w]*\.128|\bLDG\.E[.\w]*\.256", r"\bSTG\.E[.\w]*\.128|\bSTG\.E[.\w]*\.256"),
    "amd": (r"(global|buffer)_load_dwordx[24]", r"(global|buffer)_store_dwordx[24]"),
}


def compile_elsewhere(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Facts of each case, in order: see `facts_of`. A case has module, kernel, target, signature, constants, aligned, warps."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(cases), env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def facts_of(case: dict[str, Any]) -> dict[str, Any]:
    """{"wide_loads", "wide_stores", "local_bytes": stack and spills, "registers"}.

    Wide is 128 bits on NVIDIA; on AMD, where twice the threads share a block, 64 or 128.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(importlib.import_module(case["module"]), case["kernel"])
    constants = {name: value for name, value in case["constants"].items()}
    signature = {name: "constexpr" if name in constants else case["signature"][name] for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case["aligned"]}
    target = case["target"]
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = compile(source, target=gpu, options={"num_warps": case["warps"]})
    return _amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(compiled.asm["cubin"])


def _amd(text: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found, name
        return int(found[1])

    local = number("private_segment_fixed_size") + 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return {**_count(text, "amd"), "local_bytes": local, "registers": number("vgpr_count")}


def _nvidia(cubin: bytes) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    return {**_count(text, "nvidia"), "local_bytes": int(found[2]) + int(found[3]), "registers": int(found[1])}


def _count(text: str, vendor: str) -> dict[str, int]:
    loads, stores = _WIDE[vendor]
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+[^;]*;", text, re.M))  # of NVIDIA's code
    wide = {"wide_loads": len(re.findall(loads, text)), "wide_stores": len(re.findall(stores, text))}
    return {**wide, "instructions": instructions}


if __name__ == "__main__":
    json.dump([facts_of(case) for case in json.load(sys.stdin)], sys.stdout)
