"""docs/how-to/distil-your-own.md from end to end, with a tiny teacher and the page's own prompts and recipe."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from imagine_flash.tests.architectures import save_clip
from imagine_flash.tests.commands import run
from imagine_flash.tests.pipelines import build_pipeline

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[1] / "docs/how-to/distil-your-own.md"
SMALL = {"steps": 2, "batch": 4, "accumulate": 2, "preview_every": 0}  # instead of the page's sizes


def block(title: str) -> str:
    """What the page says to save under this name."""
    found = re.search(rf'```\w+ title="{re.escape(title)}"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{PAGE} has no {title}"
    return found[1]


def ran(*arguments: str | Path) -> str:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_teacher_becomes_a_student_that_is_compared_exported_and_drawn_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))
    teacher: Any = build_pipeline()
    teacher.save_pretrained("my-teacher", safe_serialization=True)
    Path("prompts.txt").write_text(block("prompts.txt") + "a cat\na fox on a pink background\na dog below a fox\n")
    recipe = yaml.safe_load(block("my-recipe.yaml"))
    Path("my-recipe.yaml").write_text(yaml.safe_dump(recipe | {"fit": recipe["fit"] | SMALL}))
    ran("distill", "my-teacher", "runs/student", "--recipe", "my-recipe.yaml", "--prompts", "prompts.txt")
    student = json.loads(Path("runs/student/imagine_flash.json").read_text())
    assert (
        student["format"] == "imagine-flash-student" and Path("runs/student/pytorch_lora_weights.safetensors").is_file()
    )

    Path("pictures/teacher").mkdir(parents=True)
    said = ran(
        "generate", "--prompts", "prompts.txt", "-o", "pictures/student", "--model", "runs/student", "--seed", "0"
    )
    assert "(5 pictures, 5 of them new)" in said
    teacher.set_progress_bar_config(disable=True)
    for row in map(json.loads, Path("pictures/student/metadata.jsonl").read_text().splitlines()):
        how: Any = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(row["seed"])}
        teacher(row["text"], height=64, width=64, **how).images[0].save(Path("pictures/teacher", row["file_name"]))
    clip = save_clip(tmp_path / "clip", 8)
    said = ran("compare", "pictures/teacher", "pictures/student", "--features", clip)
    assert "5 pairs of pictures" in said and "CLIP score: teacher" in said

    ran("export", "runs/student", "runs/artifact")
    assert "fox.png (3 steps, seed 7)" in ran(
        "generate", "a fox", "--seed", "7", "--model", "runs/artifact", "-o", "fox.png"
    )
