"""The measures by their closed forms, and the whole command on tiny networks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.benchmarks.quality.evaluate import (
    as_markdown,
    draw_prompts,
    evaluate,
    fidelity,
    frechet_distance,
    unbiased_frechet_distance,
)
from imagine_flash.benchmarks.quality.judge import load_judge
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.data.captions import Caption, Scene
from imagine_flash.distill.data.emoji import held_out_combinations


def test_frechet_distance_of_gaussians() -> None:
    """Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2, exactly."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((4000, 6))
    raw = (raw - raw.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    scale, shift = np.array([1, 2, 3, 0.5, 1, 1.0]), np.array([0, 1, 0, 0, -2, 0.0])
    got = frechet_distance(raw * scale + shift, np.zeros(6), np.eye(6))
    assert got == pytest.approx((shift**2).sum() + ((scale - 1) ** 2).sum(), abs=1e-9)
    assert frechet_distance(raw, np.zeros(6), np.eye(6)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_the_covariances_do_not_commute_with_the_identity_alone() -> None:
    """C1 = M C2 M with M symmetric positive: the distance is |m1 - m2|^2 + tr((M - I) C2 (M - I)) (optimal map M)."""
    rng = np.random.default_rng(1)
    raw = rng.standard_normal((4000, 4))
    raw = (raw - raw.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T  # exactly white
    a, b = rng.standard_normal((2, 4, 4))
    second, m = a @ a.T + np.eye(4), b @ b.T + 0.5 * np.eye(4)
    first = m @ second @ m
    features = raw @ np.linalg.cholesky(first).T + np.array([1.0, 0, 0, 2])
    expected = 5 + np.trace((m - np.eye(4)) @ second @ (m - np.eye(4)))
    assert frechet_distance(features, np.zeros(4), second) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_few_samples_is_biased_and_the_extrapolation_is_not() -> None:
    """Gaussians at known distances, 64 dimensions: the samples' own distance grows with their number's inverse."""
    rng = np.random.default_rng(2)
    for shift in (0.0, 2.0):
        samples = rng.standard_normal((1024, 64)) + shift / 8  # |shift / 8| in each of 64 dimensions: shift^2 in all
        biased = frechet_distance(samples, np.zeros(64), np.eye(64))
        unbiased = unbiased_frechet_distance(samples, np.zeros(64), np.eye(64))
        assert biased > shift**2 + 1 and unbiased == pytest.approx(shift**2, abs=0.35)


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


def test_the_whole_command_on_a_real_tiny_model(tiny_student: Path, tmp_path: Path) -> None:
    """An untrained judge reads an untrained student: the numbers mean nothing, the record and the pictures are whole."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from imagine_flash.benchmarks.quality.judge import Judge

    torch.manual_seed(0)
    save_file(
        {name: v.contiguous() for name, v in Judge().state_dict().items()}, tmp_path / "judge", {"seen_all": "0.5"}
    )
    out = tmp_path / "result.v1"
    record = evaluate(tiny_student, tiny_student, tmp_path / "judge", out, count=258, held_out=4)
    assert json.loads((tmp_path / "result.v1.json").read_text()) == record
    assert Image.open(tmp_path / "result.v1.png").width > 500
    rows = {row["method"]: row for row in record["rows"]}
    assert [row["network_calls"] for row in record["rows"]] == [50, 6, 3, 2, 1, 3, 2, 1]
    one, without = rows["student, 1 step"], rows["student, 1 step, no noise correction"]
    assert one["seen"] == without["seen"] and one["fd_judge"] == without["fd_judge"]  # no effect on a plan of one step
    assert rows["student, 3 steps"]["fd_judge"] != rows["student, 3 steps, no noise correction"]["fd_judge"]
    assert record["sha256"]["student"] == record["sha256"]["teacher"]


def test_the_judge_learns_to_read_what_it_is_shown() -> None:
    """A few updates on the real stream: the loss of a fresh judge falls, and reading gives scenes of the set."""
    import torch

    from imagine_flash.benchmarks.quality.judge import JudgeTask, accuracy
    from imagine_flash.distill.data.emoji import EmojiScenes
    from imagine_flash.distill.recipe import Fit

    try:
        scenes, held_out = EmojiScenes(seed=11), EmojiScenes(seed=11, held_out=True)
    except ImagineFlashError as error:
        pytest.skip(str(error))
    task = JudgeTask(scenes, held_out, Fit(steps=1, batch=32))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        loss = task.module(**task.batch(step, 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert set(accuracy(task.judge, scenes, 20, start=10_000)) == {"object", "relation", "background", "all"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 3}, "at least 258"),
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
    row = {"method": "m", "network_calls": 3, "fd_judge": 1.234, "fd_judge_unbiased": -0.3, "held_out": {"all": 0.5}}
    row["seen"] = {"all": 0.25, "object": 1.0, "relation": 0.333, "background": 0.9999}
    record = json.loads(json.dumps({"rows": [row]}))
    assert as_markdown(record).splitlines()[-1] == "| m | 3 | 25.0 | 100.0 | 33.3 | 100.0 | 50.0 | 1.2 | -0.3 |"
