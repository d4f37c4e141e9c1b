"""A study on tiny networks: its numbers mean nothing, its record is whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from imagine_flash.benchmarks.quality import cost, evaluate, paired
from imagine_flash.benchmarks.quality import study as studies
from imagine_flash.benchmarks.quality.cost import evaluations_per_row, updates_within
from imagine_flash.benchmarks.quality.method import Method
from imagine_flash.benchmarks.quality.study import load_study, merged, run_study, slug, train_variant
from imagine_flash.benchmarks.quality.tables import quality_as_markdown, read_quality
from imagine_flash.cli import app
from imagine_flash.core.errors import RecipeError
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import load_model
from imagine_flash.distill.recipe import read_recipe
from imagine_flash.folders.files import hash_folder

FIT = {"steps": 1, "batch": 2, "warmup": 1, "preview_every": 0}
STUDIES = sorted((Path(studies.__file__).parents[1] / "studies").glob("*.yaml"))
OF_EQUAL_COST = ("methods_again", "methods_tuned")  # their updates: the weekly test below counts it


def written(folder: Path, **changes) -> Path:
    values = {"question": "Which?", "common": {"prompts": 8, "fit": FIT}, "variants": {"as it is": {}}} | changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_the_project_ships_are_valid(path: Path) -> None:
    study, recipes = load_study(path)
    assert len(recipes) == len(study.variants) >= 3
    named = path.stem in OF_EQUAL_COST
    assert study.budget or named or len({recipe.fit.steps for recipe in recipes.values()}) == 1
    assert len({recipe.model_dump_json() for recipe in recipes.values()}) == len(recipes)


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("name", OF_EQUAL_COST)
def test_the_updates_that_a_study_names_cost_what_the_comparisons_do(name: str) -> None:
    shipped = {path.stem: load_study(path) for path in STUDIES}
    budget = shipped["methods"][0].budget
    teacher = load_model(STUDIES[0].parents[2] / "assets/emoji/teacher")
    assert budget
    for variant, recipe in shipped[name][1].items():
        assert recipe.fit.steps == pytest.approx(updates_within(budget, recipe, teacher).fit.steps, rel=0.01), variant


def test_a_variant_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    assert merged({"a": 1, "fit": {"x": 1, "y": 2}}, {"a": 3, "fit": {"y": 4}}) == {"a": 3, "fit": {"x": 1, "y": 4}}
    path = written(tmp_path, variants={"one": {}, "two": {"gamma": 0.5}, "other": {"base": "lcm"}})
    _, recipes = load_study(path)
    one, two = (recipes[name].model_dump() for name in ("one", "two"))
    assert {key for key in one if one[key] != two[key]} == {"gamma"} and two["fit"]["steps"] == 1
    assert recipes["other"].method == "lcm" and recipes["other"].fit.batch == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variants": {"one": {"gama": 0.5}}}, "variant 'one': unknown key 'gama'; did you mean 'gamma'"),
        ({"variants": {}}, "variants"),
        ({"count": 12}, "count"),
        ({"split": "train"}, "split"),
        ({"base": "imagine"}, "no recipe 'imagine'"),
        ({"variants": {"a b": {}, "a, b": {"gamma": 0.5}}}, "must differ in letters and digits, got"),
    ],
)
def test_what_cannot_work_is_said_before_the_training(changes: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_study(written(tmp_path, **changes))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_study_that_is_not_there_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^no study at .*nowhere\.yaml; give a YAML file"):
        load_study(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            "lcm",
            2 + 1 + 3,
        ),  # the guided teacher, the target, and the student with its backward pass, twice a forward pass
        (
            "step_distillation",
            (10 * 2 + 30 * 2) / 40 + 3,
        ),  # the guided teacher, then two steps of the last round's student
    ],
)
def test_what_an_update_costs(method: str, expected: float, tiny_student: Path) -> None:
    values, source = read_recipe(method)
    recipe, teacher = distill_recipe(values, source), load_model(tiny_student)
    assert evaluations_per_row(recipe, teacher) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("budget", "updates"), [(60, 10), (1, 1)])
def test_a_budget_buys_updates_and_at_least_one(
    budget: float, updates: int, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "evaluations_per_row", lambda recipe, teacher: 3.0)
    values, source = read_recipe("lcm")
    recipe = distill_recipe(values | {"fit": {**values["fit"], "batch": 2}}, source)
    assert updates_within(budget, recipe, load_model(tiny_student)).fit.steps == updates


def test_the_table_of_an_evaluation_goes_into_a_page(tmp_path: Path) -> None:
    file, page = STUDIES[0].parents[2] / "docs/results/emoji_scenes.json", tmp_path / "page.md"
    page.write_text("# Ours\n\n<!-- bench:emoji_scenes --><!-- /bench -->\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["bench", "report", str(file), str(page)])
    assert done.exit_code == 0, done.output
    record = read_quality(file)
    assert record is not None and quality_as_markdown(record) in page.read_text(encoding="utf-8")
    (student,) = (row for row in record["rows"] if row["method"] == "student, 3 steps")
    assert f"| student, 3 steps | 3 | {100 * student['seen']['all']:.1f} |" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [("first", ["a"]), ("every", ["a", "b", "c"]), ("same_base", ["b"])],
    ids=lambda value: str(value),
)
def test_what_a_variant_is_compared_with(pairs: Any, expected: list[str]) -> None:
    variants = {"a": {}, "b": {"base": "lcm"}, "c": {"base": "add"}, "d": {"base": "lcm"}}
    study = studies.Study(question="Which?", variants=variants, pairs=pairs)
    assert study.compared_with("d") == expected and study.compared_with("a") == []


def test_two_variants_are_compared_where_both_take_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "between", lambda a, b, *_: {"features": [a, b]})

    def rows(variant: str, *steps: int) -> list[Method]:
        return [Method(name=f"{variant}{n}", network_calls=n, draw=lambda _: pytest.fail("drawn")) for n in steps]

    one, other = rows("a", 3, 2, 1), rows("b", 4, 2, 1)
    found: Any = {row.name: {"seen": row.name} for row in (*one, *other)}
    pairs = studies.pairs(one, other, found, dict.fromkeys(found))  # type: ignore[arg-type]
    assert [(pair["method"], pair["than"]) for pair in pairs] == [("a2", "b2"), ("a1", "b1")]
    assert all(pair["features"] == [pair["method"], pair["than"]] for pair in pairs)


@pytest.mark.slow
def test_the_whole_study_and_how_it_goes_on(
    tiny_student: Path, untrained_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished variant is neither trained nor drawn again; one of another recipe is refused."""
    variants = {"own eps": {}, "fresh": {"renoise": "fresh"}}
    small = {"count": 258, "held_out": 4, "teacher_steps": [2]}
    small["common"] = {"prompts": 8, "first_gamma": None, "fit": FIT, "adversarial": {"ramp": 0}}
    path, out = written(tmp_path, variants=variants, **small), tmp_path / "out.v1"
    monkeypatch.setattr(evaluate, "DIVERSITY_PROMPTS", 2)
    monkeypatch.setattr(paired, "RESAMPLES", 10)  # both for speed
    train_variant(path, "fresh", tiny_student, out)  # beside another command that trains the other
    trained = hash_folder(tmp_path / "out.v1.run/fresh")
    with pytest.raises(RecipeError, match=r"no variant 'fresch'; there are own eps, fresh; did you mean 'fresh'\?"):
        train_variant(path, "fresch", tiny_student, out)
    scenes = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.v1.run").glob("latents-*")}
    record = run_study(path, tiny_student, untrained_judge, out)
    assert scenes == {file: file.stat().st_mtime_ns for file in (tmp_path / "out.v1.run").glob("**/latents*")}
    assert len(scenes) == 1, "rendered once for all variants"
    assert hash_folder(tmp_path / "out.v1.run/fresh") == trained
    names = [row["method"] for row in record["rows"]]
    assert names[:4] == ["rendered scenes", "autoencoder", "teacher, 25 steps", "teacher, 2 steps"]
    assert names[4:] == [f"{variant}: student, {n} step{'s' * (n > 1)}" for variant in variants for n in (3, 2, 1)]
    assert "fd_ratio" in record["rows"][4] and record["variants"]["fresh"]["training"]["steps"] == 1
    steps = ("3 steps", "2 steps", "1 step")
    same = [(f"own eps: student, {n}", f"fresh: student, {n}") for n in steps]
    assert [(pair["method"], pair["than"]) for pair in record["pairs"]] == same
    assert "| own eps: student, 1 step | fresh: student, 1 step | " in quality_as_markdown(record)
    assert json.loads((tmp_path / "out.v1.json").read_text()) == record
    with Image.open(tmp_path / "out.v1.png") as grid:  # scenes, teacher at 25 and 2 steps, each variant's three plans
        assert grid.height > 9 * 64
    assert "- **fresh**: `{renoise: fresh}`; 1 updates" in quality_as_markdown(record)
    assert read_quality(tmp_path / "out.v1.json") == record

    monkeypatch.setattr(studies, "distill", lambda *_, **__: pytest.fail("trained again"))
    assert run_study(path, tiny_student, untrained_judge, out) == record
    older = tmp_path / "out.v1.run/fresh/imagine_flash.json"
    manifest = json.loads(older.read_text())
    del manifest["recipe"]["first_gamma"]  # as before there was that key, whose absence means null
    older.write_text(json.dumps(manifest), encoding="utf-8")
    train_variant(path, "fresh", tiny_student, out)
    other = Path(shutil.copytree(tiny_student, tmp_path / "other"))
    (other / "README.md").write_text("another teacher", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"fresh has another teacher than .*other; choose another OUTPUT, or delete"):
        train_variant(path, "fresh", other, out)
    with pytest.raises(RecipeError, match=f"{slug('own eps')} was trained by another recipe"):
        run_study(written(tmp_path, variants={"own eps": {"gamma": 0.5}}, **small), tiny_student, untrained_judge, out)
