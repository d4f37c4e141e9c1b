"""The gate of every export: what it measures, and that a graph, a tokenizer or a student that is wrong does not pass."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagine_flash.core.errors import ArtifactError, ParityError
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.export.ledger import LIMITS, Failure, Ledger
from imagine_flash.export.parity import check_parity, check_tokenizers, make_cases
from imagine_flash.export.student import _failure
from imagine_flash.export.tokenizer import write_tokenizers
from imagine_flash.export.tracing import _sampling
from imagine_flash.folders.files import hash_folder
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.pipelines.loading import load_stages
from imagine_flash.tests import architectures, pipelines


@pytest.fixture(scope="module")
def stages(student):
    return load_stages(student)


@pytest.fixture(scope="module")
def cases(student, artifact, stages):
    from imagine_flash.folders.reading import read_student_manifest

    sampling, _ = _sampling(read_student_manifest(student), stages, ExportOptions())
    with torch.inference_mode():
        return make_cases(stages, sampling, [(64, 64)], [1], ["a fox", "a cat"])


def gate(folder: Path, cases, precision: str = "fp32"):
    manifest = read_artifact_manifest(folder, verify=False)
    paths = {name: folder / spec.file for name, spec in manifest.graphs.items()}
    return check_parity(paths, manifest, cases, LIMITS[precision])


@pytest.mark.slow
def test_a_tampered_graph_does_not_pass_the_parity_gate(artifact_copy, cases):
    data = np.fromfile(artifact_copy / "weights.bin", dtype=np.float16)
    np.where(np.arange(len(data)) % 97 == 0, data + np.float16(0.5), data).tofile(artifact_copy / "weights.bin")
    known = read_artifact_manifest(artifact_copy, verify=False).graphs
    failures = gate(artifact_copy, cases).failures
    assert re.match(
        r"text_encoder: embeddings differ .* by .*prompt '.*', seed 0, batch 1, size 64x64", failures[0].message
    )
    assert {failure.graph for failure in failures} >= set(known), "every graph is named, not the first alone"
    with pytest.raises(ArtifactError, match=r"weights\.bin differs from the sha256"):
        read_artifact_manifest(artifact_copy)


@pytest.mark.slow
def test_the_worst_figures_are_kept_and_nothing_fails(artifact, cases):
    ledger = gate(artifact, cases)
    assert not ledger.failures and ledger.errors["sampler_3"]["images"] <= 1 and ledger.errors["decoder"]["psnr"] > 50
    assert ledger.errors["denoiser"]["m"] <= 1e-4 and ledger.errors["denoiser"]["m_rms"] <= 1e-4


def test_other_token_ids_do_not_pass_the_parity_gate(artifact_copy, stages):
    manifest = read_artifact_manifest(artifact_copy)
    file = artifact_copy / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    spec["padding"]["pad_id"] = 0
    file.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ParityError, match=r"^tokenizer: .* other token ids"):
        check_tokenizers(artifact_copy, manifest.tokenizers, stages, ["a fox"])


def test_prompts_of_more_tokens_than_the_model_reads(tmp_path):
    """It happened that they failed as another reading, since torch cuts them and the exported tokenizers do not; and that prompts
    which fit failed by their capitals, which are more tokens of a T5."""
    stages = stages_of(architectures.DRAWN["sd3"]())
    specs, phrase = write_tokenizers(tmp_path, stages, []), "a fox on a pink background"
    check_tokenizers(tmp_path, specs, stages, ["a fox", " ".join(29 * [phrase])])
    with pytest.raises(
        ArtifactError, match=r"the prompt 'a fox on .*\.\.\.' has 281 tokens, the model reads 256; shorten it"
    ) as raised:
        check_tokenizers(tmp_path, specs, stages, ["a fox", " ".join(35 * [phrase])])
    assert len(str(raised.value)) < 200


def break_weight(student: Path, part: str, weight: str, value: float) -> None:
    file = student / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[weight].fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_broken_student_leaves_the_old_artifact_whole(tmp_path, artifact_copy):
    student = pipelines.build_student(tmp_path / "student")
    break_weight(student, "unet", "conv_out.bias", float("nan"))
    before = hash_folder(artifact_copy)
    with pytest.raises(ParityError, match=r"^denoiser: NaN or Inf in torch itself.*prompt '"):
        export_student(student, artifact_copy)
    assert hash_folder(artifact_copy) == before
    assert {path.name for path in tmp_path.iterdir()} == {"student", "artifact"}, "nothing half-written"


def test_an_image_of_one_colour_does_not_pass_the_parity_gate(tmp_path):
    student = pipelines.build_student(tmp_path / "student")
    break_weight(student, "vae", "decoder.conv_out.weight", 0.0)
    with pytest.raises(ParityError, match=r"^decoder: an image of one colour"):
        export_student(student, tmp_path / "out")


def test_the_report_of_the_current_folder_lies_beside_it(tmp_path, monkeypatch):
    """It happened that an export to "." whose gate failed ended in a ValueError, since "." has no name."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    ledger = Ledger(LIMITS["fp32"], failures=[Failure("decoder: images differ", "decoder", None)])  # type: ignore[arg-type]
    assert str(_failure(Path("."), ledger)).endswith(f"see {tmp_path / 'out.parity'}")
    assert json.loads((tmp_path / "out.parity" / "report.json").read_text())["failures"] == ["decoder: images differ"]
