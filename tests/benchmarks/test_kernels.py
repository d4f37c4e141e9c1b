"""`bench kernels` and `bench report` as a user runs them, at the smallest shapes; what the kernels compute is tested elsewhere."""

import os
from pathlib import Path

import pytest

from imagine_flash.benchmarks.records import as_markdown, is_current
from imagine_flash.benchmarks.schema import read_record
from imagine_flash.tests.commands import fails, run, start

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "kernels"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = start(
        "bench", "kernels", "--quick", "--device", "cpu", "--rounds", "5", "-o", out, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "times as fast as" in done.stdout and str(out) in done.stdout.replace("\n", "")
    return out


@pytest.mark.slow
@pytest.mark.weekly
def test_every_kernel_is_measured_against_its_baselines(measured: Path) -> None:
    record = read_record(measured.with_suffix(".json"))
    assert [row.case["kernel"] for row in record.rows] == ["update", "to_image", "group_norm_silu"]
    for row in record.rows:
        names = [timing.name for timing in row.timings]
        assert row.baseline == names[0] and {"torch eager", "torch.compile", "ours", "copy"} <= set(names)
        assert all(check.passed and check.what == "largest difference from float64" for check in row.checks.values())
        assert row.extra["copy"]["% of copy bandwidth"] == 100
    assert "diffusers DDIM step" in record.rows[0].checks
    assert measured.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.weekly
def test_the_report_replaces_the_table_and_nothing_else(measured: Path, tmp_path: Path) -> None:
    document = tmp_path / "kernels.md"
    document.write_text("# Title\n\n<!-- bench:kernels -->\nold\n<!-- /bench -->\n\nend\n")
    done = run("bench", "report", measured.with_suffix(".json"), document)
    assert done.returncode == 0, done.stderr
    record = read_record(measured.with_suffix(".json"))
    text = document.read_text()
    assert as_markdown(record) in text and "old" not in text and text.startswith("# Title") and text.endswith("end\n")
    assert is_current(document, record, "kernels")


@pytest.mark.slow
@pytest.mark.weekly
def test_no_row_begins_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its progress is on standard error."""
    from imagine_flash.benchmarks import kernels

    monkeypatch.setattr(kernels, "refuse_interpreter", lambda: None)  # on a CPU the references run
    record = kernels.bench_kernels(tmp_path / "kernels", device="cpu", rounds=5, quick=True, until=0.0)
    assert [row.case["kernel"] for row in record.rows] == ["update"]
    told = capsys.readouterr()
    assert told.out == "" and "kernels on cpu" in told.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["kernels", "--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["kernels", "--device", "cpu", "--quick", "--rounds", "2"], "n must be at least 5 rounds, got 2"),
        (["kernels", "-o", "{tmp}/missing/k"], "is not a folder; make it first"),
        (["report", "{tmp}/none.json", "{tmp}/k.md"], "none.json"),
        (["kernels", "--device", "cuda"], "no CUDA device for 'cuda'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if "-o" not in arguments and "report" not in arguments:
        arguments = [*arguments, "-o", "{tmp}/k"]
    assert says in fails("bench", *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert not list(tmp_path.iterdir())


def test_the_interpreter_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "would time Triton's interpreter; unset it" in fails(
        "bench", "kernels", "--device", "cpu", "-o", tmp_path / "k"
    )


def test_the_tables_in_the_docs_are_those_of_the_records() -> None:
    record = read_record(ROOT / "docs/results/kernels.json")
    assert is_current(ROOT / "docs/results/kernels.md", record, "kernels")
