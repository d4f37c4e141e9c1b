"""The export of large models is measured as its record says, tried on a small one."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("psutil")
MODULE = "imagine_flash.benchmarks.full_size.export"


@pytest.mark.slow
@pytest.mark.weekly
def test_a_record_of_an_export(tmp_path: Path) -> None:
    """In a folder of its own it looked for the tokenizer and the checkout one level too low."""
    out = tmp_path / "tiny.json"
    done = subprocess.run([sys.executable, "-m", MODULE, "tiny", out, "64x64", "fp16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["name"] == "export of tiny at 64x64, batch 1, 1 step, float16 graphs"
    assert record["parameters"] > 1e6
    assert record["seconds"] > 0 and record["peak_resident_gib"] > 0.1 and record["bytes"]["weights.bin"] > 1e6
    assert set(record["nodes"]) >= {"text_encoder", "denoiser", "decoder"} and record["parity"]
    assert record["git"] is None or len(record["git"]["commit"]) == 40


@pytest.mark.parametrize("given", [["sd"], ["sd-turbo", "out.json", "512x512", "half"]])
def test_a_wrong_kind_is_one_line(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [MODULE, *given])
    with pytest.raises(SystemExit, match=r"^give one of tiny, sd15, sd-turbo"):
        import_module(MODULE).main()
