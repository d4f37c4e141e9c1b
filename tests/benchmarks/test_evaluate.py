"""The measures by their closed forms, and the whole command on tiny networks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.benchmarks.evaluate import as_markdown, draw_prompts, evaluate, fidelity, frechet_distance
from imagine_flash.benchmarks.judge import load_judge
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.data.emoji import Caption, Scene, held_out_combinations


def test_frechet_distance_of_gaussians() -> None:
    """Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2, exactly."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((4000, 6))
    raw = (raw - raw.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    scale, shift = np.array([1, 2, 3, 0.5, 1, 1.0]), np.array([0, 1, 0, 0, -2, 0.0])
    got = frechet_distance(raw * scale + shift, np.zeros(6), np.eye(6))
    assert got == pytest.approx((shift**2).sum() + ((scale - 1) ** 2).sum(), abs=1e-9)
    assert frechet_distance(raw, np.zeros(6), np.eye(6)) == pytest.approx(0, abs=1e-9)


SCENE = Scene(objects=("cat", "dog"), axis="horizontal", background="pink")
SAID = Caption(text="a cat left of a dog on pink", states_axis=True, states_background=True)


@pytest.mark.parametrize(
    ("said", "found", "right"),
    [
        (SAID, SCENE, {"object", "relation", "background", "all"}),
        (SAID, replace(SCENE, objects=("dog", "cat")), {"object", "background"}),
        (SAID, replace(SCENE, axis="vertical"), {"object", "background"}),
        (SAID, replace(SCENE, objects=("cat", "fox")), {"relation", "background"}),
        (SAID, replace(SCENE, background="red"), {"object", "relation"}),
        (replace(SAID, states_background=False), replace(SCENE, background="red"), {"object", "relation", "all"}),
        (
            replace(SAID, states_axis=False),
            replace(SCENE, objects=("dog", "cat"), axis="vertical"),
            {"object", "background", "all"},
        ),
    ],
)
def test_fidelity_counts_what_the_caption_states(said: Caption, found: Scene, right: set[str]) -> None:
    prompts = replace(draw_prompts(1, held_out=False), captions=[said], scenes=[SCENE])
    scores = fidelity(prompts, [found])
    assert {name for name, value in scores.items() if value == 1} == right


def test_held_out_prompts_state_held_out_relations() -> None:
    prompts = draw_prompts(40, held_out=True)
    for caption, scene in zip(prompts.captions, prompts.scenes, strict=True):
        assert caption.states_axis and (scene.objects[0], scene.axis, scene.objects[1]) in held_out_combinations()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 3}, "at least 129"),
        ({"out": Path("/nowhere/at/all")}, "no folder"),
        ({"judge_file": Path("none")}, "no judge"),
    ],
)
def test_bad_input(changes: dict, says: str, tmp_path: Path) -> None:
    arguments = {"teacher_folder": tmp_path, "student_folder": tmp_path, "judge_file": tmp_path, "out": tmp_path / "x"}
    with pytest.raises(ImagineFlashError, match=says):
        evaluate(**{**arguments, **changes})


def test_a_file_that_is_no_judge(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(ImagineFlashError, match="not a judge"):
        load_judge(path)


def test_the_table_is_made_of_the_record() -> None:
    row = {"method": "m", "network_calls": 3, "fd_judge": 1.234, "held_out": {"all": 0.5}}
    row["seen"] = {"all": 0.25, "object": 1.0, "relation": 0.333, "background": 0.9999}
    record = json.loads(json.dumps({"rows": [row]}))
    assert as_markdown(record).splitlines()[-1] == "| m | 3 | 25.0 | 100.0 | 33.3 | 100.0 | 50.0 | 1.23 |"
