"""The measures by their closed forms, and the whole command on tiny networks."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imagine_flash.benchmarks.quality import evaluate as evaluation
from imagine_flash.benchmarks.quality import paired
from imagine_flash.benchmarks.quality.evaluate import evaluate
from imagine_flash.benchmarks.quality.judge import load_judge
from imagine_flash.benchmarks.quality.measure import PictureStore
from imagine_flash.benchmarks.quality.method import Method
from imagine_flash.benchmarks.quality.prompts import ATTRIBUTES, Prompts, draw_prompts, kept, marks, shares
from imagine_flash.benchmarks.quality.tables import as_markdown, more_as_markdown
from imagine_flash.core.errors import ArtifactError, ImagineFlashError
from imagine_flash.distill.data.captions import Caption, Scene
from imagine_flash.distill.data.emoji import FONT_PLACES, held_out_combinations
from imagine_flash.distill.progress import progress_bar
from imagine_flash.tests.commands import run

SCENE = Scene(objects=("red heart", "dog"), axis="horizontal", background="pink", pattern="dots")
SAID = Caption(
    text="a heart left of a dog on dotted pink",
    objects=(("red heart", "blue heart"), ("dog",)),
    states_axis=True,
    states_order=True,
    states_background=True,
    states_pattern=True,
)
EVERYTHING = {"object", "relation", "background", "pattern", "all"}


@pytest.mark.parametrize(
    ("said", "found", "wrong"),
    [
        ({}, {}, set()),
        ({}, {"objects": ("dog", "red heart")}, {"relation", "all"}),
        ({}, {"objects": ("blue heart", "dog")}, set()),
        ({"objects": (("red heart",), ("dog",))}, {"objects": ("blue heart", "dog")}, {"object", "relation", "all"}),
        ({"states_order": False}, {"objects": ("dog", "red heart")}, set()),
        ({}, {"axis": "vertical"}, {"relation", "all"}),
        ({}, {"objects": ("cat", "fox")}, {"object", "relation", "all"}),  # any order of others counted as right
        ({"states_order": False}, {"objects": ("cat", "fox")}, {"object", "all"}),
        ({}, {"objects": ("dog",), "axis": None}, {"object", "relation", "all"}),
        ({}, {"background": "red"}, {"background", "all"}),
        ({"states_background": False}, {"background": "red"}, set()),
        ({}, {"pattern": "plain"}, {"pattern", "all"}),
        ({"states_axis": False, "states_order": False}, {"objects": ("dog", "red heart"), "axis": "vertical"}, set()),
    ],
)
def test_fidelity_counts_what_the_caption_states(said: dict, found: dict, wrong: set[str]) -> None:
    caption = replace(SAID, **said)
    prompts = replace(draw_prompts(1, split="test", held_out=False), captions=[caption], scenes=[SCENE])
    (row,) = marks(prompts, [replace(SCENE, **found)])
    assert {name for name, mark in zip((*ATTRIBUTES, "all"), row, strict=True) if mark == 0} == wrong
    left_out = {"relation"} if not caption.states_axis else {"background"} if not caption.states_background else set()
    assert {name for name, mark in zip((*ATTRIBUTES, "all"), row, strict=True) if mark == -1} == left_out
    assert shares(np.array([row])) == {n: float(n not in wrong) for n in (*ATTRIBUTES, "all") if n not in left_out}


def test_twins_and_single_objects() -> None:
    scene = Scene(objects=("cat", "cat"), axis="vertical", background="red", pattern="plain")
    said = replace(SAID, objects=(("cat",), ("cat",)), states_axis=False, states_order=False)
    assert kept(said, scene, scene)["object"]
    assert not kept(said, scene, replace(scene, objects=("cat",), axis=None))["object"]
    one = replace(said, objects=(("cat",),))
    assert not kept(one, replace(scene, objects=("cat",), axis=None), scene)["object"]


def test_held_out_prompts_state_held_out_relations_and_splits_differ() -> None:
    prompts = draw_prompts(40, split="test", held_out=True)
    for caption, scene in zip(prompts.captions, prompts.scenes, strict=True):
        assert caption.states_order and (scene.objects[0], scene.axis, scene.objects[1]) in held_out_combinations()
        for first, second in itertools.product(*caption.objects):  # "an apple" is a red or a green one
            assert (first, scene.axis, second) in held_out_combinations(), caption.text
    assert any(len(allowed) > 1 for caption in prompts.captions for allowed in caption.objects)
    other = draw_prompts(40, split="validation", held_out=True)
    assert prompts.texts != other.texts and not set(prompts.seeds) & set(other.seeds)


@pytest.mark.slow
def test_the_whole_command_on_a_real_tiny_model(
    tiny_student: Path, untrained_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained judge reads an untrained student: the numbers mean nothing, the record and the pictures are whole."""
    from PIL import Image

    monkeypatch.setattr(evaluation, "DIVERSITY_PROMPTS", 2)
    monkeypatch.setattr(paired, "RESAMPLES", 20)  # both for speed
    out = tmp_path / "result.v1"
    names = ["student, 3 steps", "student, 3 steps, no noise correction", "student, 1 step", "teacher, 4 steps, UniPC"]
    record = evaluate(tiny_student, tiny_student, untrained_judge, out, count=258, held_out=4, only=names)
    assert json.loads((tmp_path / "result.v1.json").read_text()) == record
    assert Image.open(tmp_path / "result.v1.png").width > 500
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["rendered scenes", "autoencoder", "teacher, 25 steps", names[3], names[0], names[2], names[1]]
    assert [rows[n]["network_calls"] for n in ("autoencoder", "teacher, 25 steps", names[3], names[0])] == [0, 50, 8, 3]
    assert rows[names[0]]["error_to_teacher"] != rows[names[1]]["error_to_teacher"]
    ratio, low, high = rows[names[0]]["fd_ratio"]
    assert low <= ratio <= high and "fd_ratio" not in rows["teacher, 25 steps"]
    assert rows["rendered scenes"]["seen"]["all"] <= 1 and "precision" not in rows["rendered scenes"]
    assert {"kd_judge", "precision", "recall", "diversity", "detail_deviation", "error_to_teacher"} <= set(
        rows[names[0]]
    )
    for table in (as_markdown(record), more_as_markdown(record)):
        assert len(table.splitlines()) == 2 + len(rows) and len({line.count("|") for line in table.splitlines()}) == 1


def test_pictures_of_other_prompts_are_drawn_anew(untrained_judge: Path, tmp_path: Path) -> None:
    """As another version of this code may draw them under the same name."""
    judge, drawn = load_judge(untrained_judge)[0], []

    def draw(part: Prompts) -> tuple[np.ndarray, None]:
        drawn.append(part.texts)
        return np.zeros((len(part), 64, 64, 3), np.uint8), None

    method, store = Method(name="black", network_calls=0, draw=draw), PictureStore(tmp_path / "pictures", "identity")
    prompts = draw_prompts(3, split="validation", held_out=False)
    other = replace(prompts, seeds=[seed + 1 for seed in prompts.seeds])
    with progress_bar(None) as bar:
        for part, times in ((prompts, 1), (prompts, 1), (other, 2), (other, 2)):
            assert len(store.measure(method, part, "seen", judge, bar).marks) == 3
            assert len(drawn) == times


@pytest.mark.slow
@pytest.mark.weekly  # a study's pictures are kept by the same store
def test_a_killed_evaluation_goes_on_and_another_draws_its_student_alone(
    tiny_student: Path, untrained_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards that are there are not drawn again; those of other models or prompts are not mixed in."""
    from imagine_flash.benchmarks.quality import measure

    def run(student: Path = tiny_student, **changes) -> dict:
        given = {"count": 258, "held_out": 4, "only": ["student, 1 step"], **changes}
        return evaluate(tiny_student, student, untrained_judge, tmp_path / "out", **given)

    drawn: list[str] = []
    draw = measure.PictureStore._draw

    def counted(method, *rest):
        drawn.append(method.name)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(method, *rest)

    monkeypatch.setattr(measure.PictureStore, "_draw", staticmethod(counted))
    with pytest.raises(KeyboardInterrupt):
        run()
    first = run()
    assert len(drawn) == 11  # three kinds of pictures of two methods, two of the other two, and one begun twice
    assert run() == first and len(drawn) == 11
    with pytest.raises(ArtifactError, match="other models, prompts or code"):
        run(split="test")
    other = Path(shutil.copytree(tiny_student, tmp_path / "other"))
    (other / "README.md").write_text("another student", encoding="utf-8")
    assert run(other)["sha256"] != first["sha256"] and drawn[11:] == 3 * ["student, 1 step"]
    assert run()["sha256"] == first["sha256"] and len(drawn) == 14, "both are kept"


@pytest.mark.slow
def test_the_judge_learns_to_read_what_it_is_shown() -> None:
    """A few updates on the real stream: the loss of a fresh judge falls, and reading gives scenes of the set."""
    import torch

    from imagine_flash.benchmarks.quality.judge import JudgeTask, accuracy
    from imagine_flash.distill.data.emoji import EmojiScenes
    from imagine_flash.distill.recipe import Fit
    from imagine_flash.distill.reproducible import Part

    try:
        scenes, held_out = EmojiScenes(seed=11), EmojiScenes(seed=11, held_out=True)
    except ImagineFlashError as error:
        pytest.skip(str(error))
    task = JudgeTask(scenes, held_out, Fit(steps=1, batch=32))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        loss = task.module(**task.batch(step, Part()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert set(accuracy(task.judge, scenes, 20, start=10_000)) == {"object", "relation", "background", "pattern", "all"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 3}, "at least 258"),
        ({"judge_file": Path("none")}, "no judge"),
        ({"split": "train"}, "no split 'train'; there are validation, test"),
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
    row = {
        "method": "m",
        "network_calls": 3,
        "fd_judge_unbiased": 12.34,
        "fd_interval": [10.0, 15.0],
        "held_out": {"all": 0.5},
        "seen": {"all": 0.25, "object": 1.0, "relation": 0.333, "background": 0.9999},
    }
    best = {**row, "method": "teacher, 25 steps", "network_calls": 50, "fd_judge_unbiased": 10.0}
    cells = "| m | 3 | 25.0 | 100.0 | 33.3 | 100.0 | – | 50.0 | 12.3 ± 2.5 | 1.23 |"
    assert as_markdown({"rows": [best, row]}).splitlines()[-1] == cells


def test_an_unknown_row_names_the_known_ones(tiny_student: Path, untrained_judge: Path, tmp_path: Path) -> None:
    with pytest.raises(ImagineFlashError, match="no row 'student'; there are: rendered scenes; "):
        evaluate(tiny_student, tiny_student, untrained_judge, tmp_path / "x", count=258, held_out=1, only=["student"])
    assert not (tmp_path / "x.run").exists()


@pytest.mark.skipif(not any(Path(p).is_file() for p in FONT_PLACES), reason="no emoji font")
def test_a_judge_by_a_recipe_from_the_command(tmp_path: Path) -> None:
    """Its test and its reference are drawn, and its progress does not stand among the results."""
    recipe, out = tmp_path / "small.yaml", tmp_path / "new" / "judge.safetensors"
    recipe.write_text("test_scenes: 8\nreference_scenes: 258\nfit: {steps: 2, batch: 4, preview_every: 0}\n")
    done = run("train-judge", out, "--recipe", recipe, "--device", "cpu")
    assert done.returncode == 0 and done.stdout == f"{out}\n" and "reference scenes" in done.stderr, done
    judge, accuracy = load_judge(out)
    assert (
        judge.reference_covariance.trace() == pytest.approx(16_000, rel=1e-3) and 0 <= float(accuracy["seen_all"]) <= 1
    )
    assert run("train-judge", out, "--recipe", recipe, "--quiet").stderr == ""
