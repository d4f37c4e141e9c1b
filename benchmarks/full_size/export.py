"""Does the export of a large model fit? Time and memory of `imagine-flash export` on full-size networks of random weights.

    python -m imagine_flash.benchmarks.full_size.export sd-turbo docs/results/export_sd_turbo.json
    python -m imagine_flash.benchmarks.full_size.export sd-turbo docs/results/export_sd_turbo_fp16.json 512x512 fp16

Neither depends on the values of the weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...folders.files import hash_folder
from ..environment import surroundings, write_record
from ..processes import COMMAND
from ..random_students import SHAPES, Shape, random_student

GRAPHS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def measure(kind: Shape, out: Path, *, size: str = "512x512", precision: str = "fp32") -> dict[str, Any]:
    """Writes the student and exports it, each in a process of its own, so that the one leaves no memory to the other.

    The record says the export's time, its largest resident memory and what was written.
    """
    with tempfile.TemporaryDirectory(prefix="imagine-flash-full-size-") as scratch:
        student, artifact = Path(scratch) / "student", Path(scratch) / "artifact"
        student.mkdir()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
            parameters = writer.submit(partial(random_student, steps=(1,)), student, kind).result()
        arguments = ["export", str(student), str(artifact), "--batch", "1", "--sizes", size, "--name", kind]
        arguments += ["--precision", precision]
        started = time.perf_counter()
        export = subprocess.Popen([*COMMAND, *arguments])
        _, status, usage = os.wait4(export.pid, 0)
        seconds = time.perf_counter() - started
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(code)
        manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
        record = {
            "name": f"export of {kind} at {size}, batch 1, 1 step, {GRAPHS[precision]} graphs",
            "parameters": parameters,
            "seconds": round(seconds, 1),
            "peak_resident_gib": round(usage.ru_maxrss / 2**20, 2),
            "bytes": {path.name: path.stat().st_size for path in sorted(artifact.iterdir()) if path.is_file()},
            "student_sha256": hash_folder(student),
            "parity": manifest["parity"],
            "nodes": {name: graph["nodes"] for name, graph in manifest["graphs"].items()},
            **surroundings("cpu"),
        }
    write_record(out, record)
    return record


def main() -> None:
    """python -m imagine_flash.benchmarks.full_size.export KIND OUT.json [SIZE [PRECISION]]"""
    if len(sys.argv) not in (3, 4, 5) or sys.argv[1] not in SHAPES or {*sys.argv[4:]} - {*GRAPHS}:
        raise SystemExit(
            f"give one of {', '.join(SHAPES)}, the record to write and, if you like, a size such as 512x512, "
            f"and one of {', '.join(GRAPHS)}"
        )
    further = dict(zip(("size", "precision"), sys.argv[3:], strict=False))
    record = measure(sys.argv[1], Path(sys.argv[2]), **further)
    print(f"{record['seconds']} s, at most {record['peak_resident_gib']} GiB")


if __name__ == "__main__":
    main()
