"""Does `distill --plan-memory` say what a training takes? The plan and the largest resident memory of one update, as LoRA on
a network of SD-Turbo's shape with random weights.

    python -m imagine_flash.benchmarks.full_size.training_memory docs/results/training_memory.json
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...folders.files import STUDENT_FILE
from ..environment import surroundings, write_record
from ..processes import COMMAND
from ..random_students import random_student

RECIPE: dict[str, Any] = {
    "plans": {1: [999]},
    "guidance": [5.0, 5.0],
    "teacher_steps": 2,
    "prompts": 1,
    "lora": {"rank": 64},
    "teacher_dtype": "bfloat16",
    "gradient_checkpointing": True,
    "fit": {"steps": 1, "batch": 2, "mixed_precision": "bf16", "preview_every": 0},
}
GIB = 2**30


def measure(out: Path) -> dict[str, Any]:
    """Writes the teacher, plans, makes one update in a process of its own, and records all three."""
    with tempfile.TemporaryDirectory(prefix="imagine-flash-full-size-") as scratch:
        teacher, recipe, prompts = (Path(scratch) / name for name in ("teacher", "recipe.yaml", "prompts.txt"))
        teacher.mkdir()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
            writer.submit(partial(random_student, steps=(1,)), teacher, "sd-turbo").result()
        (teacher / STUDENT_FILE).unlink()
        recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
        prompts.write_text("a red fox\na cat on pink\n", encoding="utf-8")
        command = ["distill", str(teacher), str(Path(scratch) / "student"), "--recipe", str(recipe), "--device", "cpu"]
        said = subprocess.run([*COMMAND, *command, "--plan-memory"], check=True, capture_output=True, text=True).stdout
        planned = {name: float(size) for size, name in re.findall(r"([\d.]+) GiB +(.+)", said)}
        libraries = _peak([sys.executable, "-c", "import imagine_flash.distill.student"])
        peak = _peak([*COMMAND, *command, "--prompts", str(prompts)])
    record = {
        "name": "one update of a LoRA on SD-Turbo's shape at 512x512",
        "recipe": RECIPE,
        "planned_gib": planned,
        "libraries_gib": round(libraries, 2),
        "peak_resident_gib": round(peak, 2),
        "measured_over_planned": round((peak - libraries) / planned["in all"], 3),
        **surroundings("cpu"),
    }
    write_record(out, record)
    return record


def _peak(command: list[str]) -> float:
    """The largest resident memory of a command, in GiB."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(code)
    return usage.ru_maxrss * 1024 / GIB


def main() -> None:
    """python -m imagine_flash.benchmarks.full_size.training_memory OUT.json"""
    if len(sys.argv) != 2:
        raise SystemExit("give the record to write")
    record = measure(Path(sys.argv[1]))
    print(f"measured over planned: {record['measured_over_planned']}")


if __name__ == "__main__":
    main()
