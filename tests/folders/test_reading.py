"""Manifests: they survive a round trip, and each wrong folder gives one line with the way out."""

import json
import shutil
from pathlib import Path

import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.folders import files
from imagine_flash.folders.files import hash_files, sha256_file
from imagine_flash.folders.manifests import (
    ArtifactManifest,
    GraphSpec,
    ModelDescription,
    StudentManifest,
    TensorSpec,
    TokenizerSpec,
)
from imagine_flash.folders.reading import digest_of, read_artifact_manifest, read_student_manifest, write_manifest

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
PLANS: dict[int, list[int | float]] = {1: [999], 2: [999, 499], 3: [999, 666, 333]}
EMBEDDED = Path(__file__).parents[2] / "assets/emoji/artifact"


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "artifact"
    (folder / "graphs").mkdir(parents=True)
    graphs = {}
    for name in ("text_encoder", "denoiser", "decoder", "sampler_3"):
        (folder / f"graphs/{name}.onnx").write_bytes(name.encode() * 50)
        spec = TensorSpec(name="x", dtype="float32", shape=["batch", 4, 8, 8])
        graphs[name] = GraphSpec(file=f"graphs/{name}.onnx", inputs=[spec], outputs=[spec], opset=20)
    (folder / "tokenizer.json").write_text("{}")
    manifest = ArtifactManifest(
        name="toy",
        created_with={"torch": "2.13.0"},
        prediction_type="v_prediction",
        scheduler=SCHEDULER,
        plans=PLANS,
        noise_correction=True,
        latent_channels=4,
        downscale=8,
        sizes=[(64, 64)],
        batch=(1, 4),
        scaling_factor=0.18215,
        tokenizers=[TokenizerSpec(file="tokenizer.json", context_length=16, known_words=["cat"])],
        graphs=graphs,
        files=hash_files(folder),
        parity={"denoiser": {"max_abs": 1e-6}},
        student_sha256="0" * 64,
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    write_manifest(
        folder, StudentManifest(plans=PLANS, noise_correction=True, recipe={"k": 4}, teacher_sha256="0" * 64)
    )
    return folder


def edit(folder, file="manifest.json", with_digest=True, **changes):
    """Change fields; `with_digest`: as a writer would, with the digest of the new ones."""
    raw = json.loads((folder / file).read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = raw
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[last]
        else:
            node[last] = value
    if with_digest and file == "manifest.json":
        raw["sha256"] = digest_of(raw)
    (folder / file).write_text(json.dumps(raw))


def test_an_artifact_round_trip(artifact):
    manifest = read_artifact_manifest(artifact)
    assert manifest.plans == PLANS
    assert manifest.step_plans[2].timesteps == (999, 499)
    assert manifest.schedule.signal_at_T == pytest.approx(0.0683, abs=1e-4)
    assert [len(table) for table in manifest.update_tables().values()] == [1, 2, 3]
    assert sorted(manifest.files) == sorted([*(g.file for g in manifest.graphs.values()), "tokenizer.json"])
    assert manifest.graphs["denoiser"].inputs[0].shape == ["batch", 4, 8, 8]


def test_the_file_keeps_its_order_of_fields():
    """What any model says of itself comes first, then an artifact's own."""
    known = list(json.loads(read_artifact_manifest(EMBEDDED, verify=False).model_dump_json()))
    own = [name for name in ArtifactManifest.model_fields if name not in ModelDescription.model_fields]
    assert known[:2] == ["format", "format_version"] and known[-len(own) :] == own


def test_a_student_round_trip(student):
    manifest = read_student_manifest(student)
    assert manifest.recipe == {"k": 4}
    assert {n: plan.timesteps for n, plan in manifest.step_plans.items()} == {n: tuple(p) for n, p in PLANS.items()}
    with pytest.raises(ValueError, match="frozen"):
        manifest.noise_correction = False  # type: ignore[misc]


def test_a_link_out_of_the_folder_is_refused(artifact, tmp_path):
    """Its hash may be right, and yet what onnxruntime and OpenVINO read beside it is another folder's."""
    blob = tmp_path / "blob"
    shutil.move(artifact / "graphs/denoiser.onnx", blob)
    (artifact / "graphs/denoiser.onnx").symlink_to(blob)
    with pytest.raises(ArtifactError, match=r"graphs/denoiser\.onnx is a link that leads out of the folder"):
        read_artifact_manifest(artifact)


@pytest.mark.parametrize("name", ["weights.bin", "graphs/other.onnx", "model.onnx.data"])
def test_a_file_that_a_graph_could_load_must_be_listed(artifact, name):
    """It happened that weights.bin, left out of the manifest's files, was loaded without its hash."""
    (artifact / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=f"{name} is not listed in manifest.json"):
        read_artifact_manifest(artifact)
    (artifact / name).unlink()
    (artifact / "README.md").write_text("what a hub adds is no harm")
    assert read_artifact_manifest(artifact).name == "toy"


@pytest.mark.parametrize(
    "changes",
    [
        {"plans": {"1": [999], "2": [999, 400], "3": [999, 666, 333]}},
        {"noise_correction": False},
        {"scaling_factor": 0.2},
        {"scheduler__beta_end": 0.011},
        {"prediction_type": "epsilon"},
        {"batch": [1, 3]},
        {"sha256": ""},
        {"sha256": None},
    ],
)
def test_a_manifest_that_was_changed_by_hand_is_refused(artifact, changes):
    """It happened that `inspect` accepted other plans and betas than those that were checked."""
    edit(artifact, with_digest=False, **changes)
    with pytest.raises(ArtifactError, match="was changed after the export"):
        read_artifact_manifest(artifact)


def test_a_file_is_hashed_once_a_process_unless_it_changes(artifact, monkeypatch):
    """It happened that a start hashed the artifact three times."""
    hashed = []
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    for _ in range(3):
        read_artifact_manifest(artifact)
    assert len(hashed) == len(set(hashed)) == 5
    (artifact / "tokenizer.json").write_text("{ }")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json differs"):
        read_artifact_manifest(artifact)


BAD_FIELDS = [
    ({"format": "something"}, "'format' must be 'imagine-flash-artifact', got 'something'"),
    ({"format": None}, "'format' must be 'imagine-flash-artifact', got None"),
    ({"format_version": 2}, "format_version 2 is newer than 1, the newest this version reads; upgrade"),
    ({"format_version": "1"}, "format_version: Input should be 1, got '1'"),
    ({"schedular": {}}, "unknown field 'schedular'; did you mean 'scheduler'?"),
    ({"name": None}, "the field 'name' is missing"),
    (
        {"prediction_type": "v"},
        "prediction_type: Input should be 'epsilon', 'v_prediction', 'sample' or 'flow', got 'v'",
    ),
    ({"prediction_type": "flow"}, "flow prediction needs a flow schedule"),
    ({"scheduler__beta_schedule": "scaled_linaer"}, "did you mean 'scaled_linear'?"),
    ({"plans": {}}, "at least one plan"),
    ({"plans__2": [999]}, "the plan for 2 steps visits 1 timesteps"),
    ({"plans__2": [1000, 3]}, "timestep 1000 is outside the schedule's 0..999"),
    ({"plans__2": ["a", 3]}, "plans.2.0: Input should be a valid integer"),
    ({"scaling_factor": 0}, "scaling_factor: Input should be greater than 0, got '0'"),
    ({"sizes": [[64, 0]]}, "sizes: sizes must be >= 1, got [(64, 0)]"),
    ({"sizes": [[64, 60]]}, "the size 60x64 is no multiple of downscale 8"),
    ({"sizes": []}, "sizes: List should have at least 1 item"),
    ({"sizes": [[64, 64], [64, 96]]}, "the graph 'decoder_96x64' is missing"),
    (
        {"any_size": {"smallest": 60, "largest": 128, "multiple": 8}},
        "any_size: must run upwards in multiples of 8, got 60-128",
    ),
    (
        {"any_size": {"smallest": 96, "largest": 128, "multiple": 32}},
        "the size 64x64 is not among sides of 96 to 128 in multiples of 32",
    ),
    ({"any_size": {"smallest": 64, "largest": 128, "multiple": 32, "step": 1}}, "unknown field 'any_size.step'"),
    ({"batch": [4, 1]}, "batch: the batch must run from 1 or more upwards, got 4-1"),
    ({"precision": "fp8"}, "precision: Input should be 'fp32', 'fp16' or 'bf16', got 'fp8'"),
    (
        {"references": [{"file": "a.png", "prompt": "a", "seed": 1, "steps": 1, "size": [64, 64]}]},
        "'a.png' is used but has no sha256 in 'files'",
    ),
    ({"graphs": {}}, "the graph 'decoder' is missing"),
    ({"graphs__denoiser__opset": "new"}, "graphs.denoiser.opset: Input should be a valid integer"),
    (
        {"tokenizers": [{"file": "words.json", "context_length": 16}]},
        "'words.json' is used but has no sha256 in 'files'",
    ),
    ({"files__../secret": "0" * 64}, "'../secret' leaves the folder"),
    ({"files__/etc/passwd": "0" * 64}, "'/etc/passwd' leaves the folder"),
    ({"files__C:\\secret": "0" * 64}, "leaves the folder"),
    ({"files__tokenizer.json": "abc"}, "the sha256 of 'tokenizer.json' must be 64 hex digits, got 'abc'"),
    ({"files__gone.bin": "0" * 64}, "gone.bin is missing; copy the folder again"),
    ({"files__tokenizer.json": "0" * 64}, "tokenizer.json differs from the sha256 in manifest.json"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS, ids=[next(iter(c)) for c, _ in BAD_FIELDS])
def test_a_wrong_field_is_named(artifact, changes, message):
    edit(artifact, **changes)
    with pytest.raises(ArtifactError) as caught:
        read_artifact_manifest(artifact)
    assert message in str(caught.value)
    assert str(artifact) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sampler_for_a_plan_that_is_not_there(artifact):
    edit(artifact, plans__3=None)
    with pytest.raises(ArtifactError, match="unknown graph 'sampler_3'"):
        read_artifact_manifest(artifact)


def test_graphs_of_stages_may_be_missing_where_there_are_whole_samplers(artifact):
    raw = json.loads((artifact / "manifest.json").read_text())
    edit(artifact, graphs={"sampler_3": raw["graphs"]["sampler_3"]})
    assert set(read_artifact_manifest(artifact).graphs) == {"sampler_3"}


def test_graphs_are_called_by_their_size(artifact):
    manifest = read_artifact_manifest(artifact).model_copy(update={"sizes": [(64, 64), (512, 768)]})
    names = [manifest.graph_name(kind, size) for kind in ("text_encoder", "sampler_2") for size in manifest.sizes]
    assert names == ["text_encoder", "text_encoder", "sampler_2", "sampler_2_768x512"], (
        "width first, as people write it"
    )
    assert manifest.latent_shape == (4, 8, 8) and manifest.latent_shape_of((512, 768)) == (4, 64, 96)


def test_a_truncated_graph_is_named_and_verify_can_be_left_out(artifact):
    path = artifact / "graphs/denoiser.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"graphs/denoiser\.onnx differs from the sha256"):
        read_artifact_manifest(artifact)
    assert read_artifact_manifest(artifact, verify=False).name == "toy"
    path.unlink()
    with pytest.raises(ArtifactError, match=r"graphs/denoiser\.onnx is missing"):
        read_artifact_manifest(artifact, verify=False)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\x00\xff", '"text"', "[" * 100_000])
def test_a_manifest_that_is_none(artifact, content):
    (artifact / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"is not valid JSON|'format' must be") as caught:
        read_artifact_manifest(artifact)
    assert "\n" not in str(caught.value)


def test_folders_of_another_kind_say_which_command_helps(artifact, student, tmp_path):
    pipeline, empty, other = tmp_path / "pipeline", tmp_path / "empty", tmp_path / "other"
    for folder in (pipeline, empty, other):
        folder.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    (other / "notes.txt").write_text("hello")
    table = [
        (read_artifact_manifest, student, f"is a student, not an artifact; run: imagine-flash export {student} OUT"),
        (
            read_artifact_manifest,
            pipeline,
            f"is a diffusers pipeline without manifest.json; if it draws in few steps, run: imagine-flash export {pipeline} OUT "
            f"--steps N; else: imagine-flash distill {pipeline} OUT, and export that",
        ),
        (read_artifact_manifest, empty, "is empty; it should hold manifest.json"),
        (read_artifact_manifest, other, "holds no manifest.json; it is neither a student nor an artifact"),
        (read_artifact_manifest, tmp_path / "gone", "does not exist; check the path"),
        (read_artifact_manifest, other / "notes.txt", "is not a folder; give the folder that holds manifest.json"),
        (read_student_manifest, artifact, "is an exported artifact, not a student"),
        (read_student_manifest, pipeline, f"without imagine_flash.json; run: imagine-flash distill {pipeline} OUT"),
        (read_student_manifest, empty, "is empty; it should hold imagine_flash.json"),
    ]
    for read, folder, message in table:
        with pytest.raises(ArtifactError) as caught:
            read(folder)
        assert str(caught.value).startswith(str(folder))
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, "the field 'recipe' is missing"),
        ({"format": "imagine-flash-artifact"}, "'format' must be 'imagine-flash-student'"),
        ({"format_version": 7}, "format_version 7 is newer than 1"),
        ({"noise_corection": True}, "unknown field 'noise_corection'; did you mean 'noise_correction'?"),
        ({"plans__2": [499, 999]}, "must decrease strictly"),
        ({"noise_correction": "perhaps"}, "noise_correction: Input should be a valid boolean"),
    ],
)
def test_a_wrong_student(student, changes, message):
    edit(student, "imagine_flash.json", **changes)
    with pytest.raises(ArtifactError) as caught:
        read_student_manifest(student)
    assert message in str(caught.value)


def test_a_student_without_its_pipeline(student):
    (student / "model_index.json").unlink()
    with pytest.raises(ArtifactError, match=r"model_index\.json is missing"):
        read_student_manifest(student)
