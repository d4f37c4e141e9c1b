"""Which TensorRT plan fits: keys, records, and the message where none does. No TensorRT is needed."""

import json
import re
from pathlib import Path

import pytest

from imagine_flash.core.errors import ArtifactError, MissingExtraError
from imagine_flash.export.tensorrt import write_plan, write_tensorrt
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest
from imagine_flash.folders.tensorrt_plans import Machine, PlanRecord, find_plan
from imagine_flash.tests.tensorrt_artifact import (
    HERE,
    NEEDS_TENSORRT,
    WITHOUT_TENSORRT,
    build_artifact,
    flip,
    key_of,
    rehash,
)


@pytest.fixture
def artifact(tmp_path):
    return build_artifact(tmp_path / "artifact")


def changed_batch(folder: Path) -> None:
    write_tensorrt(folder, read_artifact_manifest(folder).model_copy(update={"batch": (1, 5)}))


CHANGES = {
    "a byte of the graph": (lambda folder: flip(folder / "denoiser.onnx"), "graph_sha256"),
    "a byte of the weights": (lambda folder: flip(folder / "weights.bin"), "weights_sha256"),
    "the profiles": (changed_batch, "profiles"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_plan_is_made_from_changes_its_name(artifact, change):
    act, field = change
    before = key_of(artifact)
    write_plan(artifact, before, b"plan")
    act(artifact)
    rehash(artifact)
    after = key_of(artifact)
    assert before.file != after.file
    assert [f for f in before.model_dump() if getattr(before, f) != getattr(after, f)] == [field]
    with pytest.raises(ArtifactError, match=f"no TensorRT plan of 'denoiser' fits: {field} differs; run"):
        find_plan(artifact, "denoiser", machine=HERE)


def test_every_machine_and_flag_has_its_own_name(artifact):
    machines = [HERE, *(HERE.model_copy(update={field: "10.3"}) for field in ("sm", "tensorrt"))]
    flags = [(), ("REFIT",), ("VERSION_COMPATIBLE",), ("REFIT", "VERSION_COMPATIBLE")]
    names = {key_of(artifact, machine, chosen).file for machine in machines for chosen in flags}
    assert len(names) == 12
    assert key_of(artifact).file == key_of(artifact).file
    assert re.fullmatch(r"denoiser_sm_90_trt10\.16\.1\.11_[0-9a-f]{16}\.plan", key_of(artifact).file)
    assert key_of(artifact, flags=("REFIT",)).flags == ["REFIT", "STRONGLY_TYPED"]


def test_a_plan_is_found_and_checked(artifact):
    assert find_plan(artifact, "denoiser") is None  # without asking for TensorRT
    refit = write_plan(artifact, key_of(artifact, flags=("REFIT",)), b"refittable")
    assert find_plan(artifact, "denoiser", machine=HERE) == refit
    plain = write_plan(artifact, key_of(artifact), b"plain")
    assert find_plan(artifact, "denoiser", machine=HERE) == plain, "the one without flags goes first"
    assert find_plan(artifact, "decoder", machine=HERE) is None
    read_artifact_manifest(artifact)  # plans do not disturb the artifact's hashes
    flip(plain)
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(plain))} differs from its sha256; delete it and run"):
        find_plan(artifact, "denoiser", machine=HERE)
    plain.unlink()
    assert find_plan(artifact, "denoiser", machine=HERE) == refit, "a record without its plan counts as not there"


@pytest.mark.parametrize(
    ("there", "flags", "message"),
    [
        ({"sm": "sm_80"}, (), "sm is sm_90 here and sm_80 in the plan; run 'imagine-flash build-tensorrt"),
        ({"driver": "570.1"}, (), None),
        ({"tensorrt": "10.15.1.29"}, (), "tensorrt is 10.16.1.11 here and 10.15.1.29 in the plan"),
        ({"tensorrt": "10.15.1.29"}, ("VERSION_COMPATIBLE",), None),
        ({"tensorrt": "10.16.2.0"}, ("VERSION_COMPATIBLE",), "tensorrt is 10.16.1.11 here and 10.16.2.0"),
        ({"tensorrt": "9.3.0"}, ("VERSION_COMPATIBLE",), "tensorrt is 10.16.1.11 here and 9.3.0"),
        ({"tensorrt": "10.9.0", "sm": "sm_80"}, ("VERSION_COMPATIBLE",), "fits: sm is sm_90 here and sm_80"),
    ],
)
def test_plans_of_another_machine(artifact, there, flags, message):
    plan = write_plan(artifact, key_of(artifact, HERE.model_copy(update=there), flags), b"plan")
    if message is None:
        assert find_plan(artifact, "denoiser", machine=HERE) == plan
        return
    with pytest.raises(ArtifactError, match=re.escape(message)):
        find_plan(artifact, "denoiser", machine=HERE)


def test_the_nearest_plan_is_named(artifact):
    write_plan(artifact, key_of(artifact, Machine(sm="sm_80", driver="1", tensorrt="11.0")), b"far")
    write_plan(artifact, key_of(artifact, HERE.model_copy(update={"sm": "sm_120"})), b"near")
    with pytest.raises(ArtifactError, match="fits: sm is sm_90 here and sm_120 in the plan; run"):
        find_plan(artifact, "denoiser", machine=HERE)


def test_an_update_of_the_driver_leaves_the_plan(artifact):
    plan = write_plan(artifact, key_of(artifact), b"plan", driver="570.1")
    assert PlanRecord.model_validate_json(plan.with_suffix(".json").read_bytes()).driver == "570.1"
    assert find_plan(artifact, "denoiser", machine=HERE.model_copy(update={"driver": "590.1"})) == plan


def test_a_record_of_before_says_what_differs(artifact):
    """Its key held the driver and one profile for all batches."""
    record = write_plan(artifact, key_of(artifact), b"plan").with_suffix(".json")
    old = json.loads(record.read_text())
    old["key"] |= {"driver": old.pop("driver"), "profile": {"x": [[1, 4, 8, 8], [4, 4, 8, 8], [4, 4, 8, 8]]}}
    del old["key"]["profiles"]
    record.write_text(json.dumps(old))
    with pytest.raises(ArtifactError) as error:
        find_plan(artifact, "denoiser", machine=HERE)
    differs = "profiles differs; run 'imagine-flash build-tensorrt"
    assert str(error.value) == f"no TensorRT plan of 'denoiser' fits: {differs} {artifact}' here"


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((1, 4), [(1, 1, 1), (2, 4, 4)]),
        ((1, 2), [(1, 1, 1), (2, 2, 2)]),
        ((1, 1), [(1, 1, 1)]),
        ((2, 8), [(2, 2, 2), (3, 8, 8)]),
    ],
)
def test_the_smallest_batch_has_a_profile_of_its_own(artifact, batch, expected):
    write_tensorrt(artifact, read_artifact_manifest(artifact).model_copy(update={"batch": batch}))
    rehash(artifact)
    key = key_of(artifact)
    assert [tuple(shape[0] for shape in profile["x"]) for profile in key.profiles] == expected
    assert all(shape[1:] == [4, 8, 8] for profile in key.profiles for shape in profile["x"])
    taken = [key.profile_for({"x": [n, 4, 8, 8]}) for n in range(10)]
    assert taken == [
        next((i for i, (low, _, high) in enumerate(expected) if low <= n <= high), None) for n in range(10)
    ]
    assert key.profile_for({"x": [batch[0], 4, 8, 16]}) is None


def test_damaged_recipes_and_records(artifact):
    with pytest.raises(ArtifactError, match=r"no TensorRT recipe for the graph 'denoisr'; did you mean 'denoiser'\?"):
        key_of(artifact, graph="denoisr")
    key = key_of(artifact)
    write_plan(artifact, key, b"plan").with_suffix(".json").write_text("{")
    with pytest.raises(ArtifactError, match=r"denoiser_sm_90.*\.json: Invalid JSON.*delete it"):
        find_plan(artifact, "denoiser", machine=HERE)
    recipe = artifact / "tensorrt" / "build.json"
    recipe.write_text(recipe.read_text().replace("weights.bin", "other.bin"))
    rehash(artifact)
    with pytest.raises(ArtifactError, match=r"build\.json uses 'other.bin', which the manifest does not list"):
        key_of(artifact)
    write_plan(artifact, key, b"plan")
    manifest = read_artifact_manifest(artifact)
    files = {name: digest for name, digest in manifest.files.items() if name != "tensorrt/build.json"}
    write_manifest(artifact, manifest.model_copy(update={"files": files}))
    recipe.unlink()
    with pytest.raises(ArtifactError, match=r"build\.json is missing; export again with the format 'tensorrt'"):
        find_plan(artifact, "denoiser", machine=HERE)


@WITHOUT_TENSORRT
def test_without_tensorrt_one_line_says_what_to_do(artifact):
    write_plan(artifact, key_of(artifact), b"plan")
    with pytest.raises(MissingExtraError) as error:
        find_plan(artifact, "denoiser")
    assert str(error.value) == NEEDS_TENSORRT.format(artifact)
